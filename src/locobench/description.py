"""What is in a study's `study.json`: read and checked, for whoever goes on with the study or reports on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locobench import plain_json, spaces
from locobench.errors import BenchError
from locobench.runfile import is_count
from locobench.settings import MOST_SEED, MOST_THREADS

_TEXTS = ("data", "model", "activation", "device", "sampler", "pruner")
_SMALLEST = {"epochs": 1, "batch_size": 1, "threads": 1, "trials": 1, "seed": 0, "protocol": 1}
MOST_TRIALS = 100_000  # of a method; all are planned in memory
_LARGEST = {"threads": MOST_THREADS, "seed": MOST_SEED, "trials": MOST_TRIALS}
_KEYS = {*_TEXTS, *_SMALLEST, "train_size", "spaces", "widened"}


def read(path: Path) -> dict[str, Any]:
    """The content of the file.

    Raises:
        BenchError: It cannot be read, or something in it is not as it should be, by name.
        FileNotFoundError: It is not there.
    """
    try:
        content = plain_json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        _check(content)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, BenchError) as error:
        raise BenchError(f"{path} is damaged ({error}); restore it, or choose another folder") from error
    return content


def _check(content: Mapping[str, Any]) -> None:
    missing = _KEYS - content.keys()
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    for key in _TEXTS:
        _want(isinstance(content[key], str), key, content[key], "a string")
    for key, smallest in _SMALLEST.items():
        _want(is_count(content[key], smallest), key, content[key], f"a whole number of at least {smallest}")
        largest = _LARGEST.get(key, content[key])
        _want(content[key] <= largest, key, content[key], f"at most {largest}")
    size = content["train_size"]
    _want(size is None or is_count(size, 1), "train_size", size, "a whole number of at least 1, or null")
    for key, kind in {"spaces": dict, "widened": dict, "versions": dict, "machine": dict, "continued": list}.items():
        value = content.get(key, kind())
        _want(isinstance(value, kind), key, value, "an object" if kind is dict else "a list")
    for one in [content, *content.get("continued", [])]:
        _want(isinstance(one, dict), "an entry of continued", one, "an object")
        for key in ("date", "commit"):
            _want(isinstance(one.get(key), str | None), key, one.get(key), "a string or null")
    for method, found in content["spaces"].items():
        _check_space(found, f"the space of {method}")
    for method, widenings in content["widened"].items():
        known = method in content["spaces"] and isinstance(widenings, list)
        _want(known, f"widened, {method}", widenings, "a list, for a method that has a space")
        for one in widenings:
            _want(isinstance(one, dict) and {"space", "new"} <= one.keys(), f"widened, {method}", one, "space and new")
            for key in ("space", "new"):
                _check_space(one[key], f"the wider space of {method}")
                same = one[key].keys() == content["spaces"][method].keys()
                _want(same, f"widened, {method}", list(one[key]), f"of {', '.join(content['spaces'][method])}")


def _check_space(found: object, place: str) -> None:
    if not isinstance(found, dict) or "lr" not in found:
        raise ValueError(f"{place} should be an object with a range of lr, is {found!r}")
    spaces.from_data(found, place)


def _want(right: bool, name: str, value: object, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value!r}, should be {wanted}")
