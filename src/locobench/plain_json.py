"""JSON as files here have it: numbers that a float holds, text that can be written, no bottomless nesting."""

import json
import math
from typing import Any

_DIGITS = 25  # of a whole number; a count has far fewer, and a float as short as these never overflows

_LEVELS = 40  # of lists and objects in one another; files here have less than ten


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, or holds NaN, an infinite or overlong number, or half a surrogate pair, which no file
            can be given.
    """
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > _LEVELS and _depth(value) > _LEVELS:  # others would run out of stack later
        raise ValueError("nested too deeply")
    if "\\u" in text:  # an escape is the only way for a surrogate into a text that was read as UTF-8
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair, {error.object[error.start]!a}, is no text") from None
    return value


def _depth(value: Any) -> int:
    deepest, levels = 0, [value]
    while levels:
        deepest += 1
        levels = [
            part
            for one in levels
            if isinstance(one, list | dict)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
    return deepest


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number that a file here may hold")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{_short(text)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{_short(text)} is too large")
    return int(text)


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:12]}… ({len(text)} characters)"
