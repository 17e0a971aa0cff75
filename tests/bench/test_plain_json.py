"""What the benchmark's files may hold."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locobench import plain_json

NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_can_be_written_is_read(value: object):
    assert plain_json.loads(json.dumps(value)) == value
    assert plain_json.loads(json.dumps(value, ensure_ascii=False)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("1e999", "1e999 is too large"),
        ("1" + "0" * 400, r"100000000000… \(401 characters\) is too large"),
        ("1" * 5000, "too large"),
        ('["\\ud800"]', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" * 50 + "]" * 50, "nested too deeply"),
        ('{"a": ', "Expecting value"),
    ],
    ids=lambda value: value[:12],
)
def test_what_no_file_should_hold(text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        plain_json.loads(text)
