"""The search spaces: which values of which hyperparameters `tune` tries. They are data, in spaces.toml."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from math import exp, inf, isfinite, log
from typing import Any, Literal, get_args

from locobench.errors import BenchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scale = Literal["log", "complement"]
Side = Literal["lower", "upper"]

EDGE = 0.1  # share of a range, at each end, within which a best value counts as on the edge
WIDENING = 0.5  # share of a range by which it grows at an edge
_DIGITS = 3  # of the values that are tried: as many as a user would type


@dataclass(frozen=True)
class Range:
    """The values of a hyperparameter that are tried.

    Attributes:
        low: The smallest.
        high: The largest.
        scale: Of the search: `log` of the value, or (`complement`) of 1 - value.
    """

    low: float
    high: float
    scale: Scale = "log"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise BenchError(f"unknown scale {self.scale!r}; there are: {', '.join(get_args(Scale))}")
        within = 0 < self.low < self.high < inf if self.scale == "log" else 0 <= self.low < self.high < 1
        if not within:
            wanted = "0 < low < high" if self.scale == "log" else "0 <= low < high < 1"
            raise BenchError(f"a {self.scale} range needs {wanted}, got {self.low} and {self.high}")
        if not self._coordinate(self.low) < self._coordinate(self.high):
            raise BenchError(f"{self.low} and {self.high} are too close for a range")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def position(self, value: float) -> float:
        """Where a value is in the range: 0 at its low end, 1 at its high end."""
        start, end = self._coordinate(self.low), self._coordinate(self.high)
        return (self._coordinate(value) - start) / (end - start)

    def value(self, position: float) -> float:
        """The value at that position, with few digits, within the range."""
        start, end = self._coordinate(self.low), self._coordinate(self.high)
        value = self._round(start + position * (end - start))
        return min(max(value, self.low), self.high)

    def edge(self, value: float) -> Side | None:
        """The end of the range that a value is at, None for neither or where there is nothing beyond it."""
        position = self.position(value)
        if position <= EDGE and self.low > 0:
            return "lower"
        return "upper" if position >= 1 - EDGE else None

    def widened(self, side: Side) -> "Range":
        """The range grown at one end."""
        start, end = self._coordinate(self.low), self._coordinate(self.high)
        if side == "upper":
            return replace(self, high=self._round(end + WIDENING * (end - start), digits=2))
        low = self._round(start - WIDENING * (end - start), digits=2)
        return replace(self, low=low if self.scale == "log" else max(0.0, low))

    def as_data(self) -> Any:
        """As spaces.toml has it."""
        bounds = [self.low, self.high]
        return bounds if self.scale == "log" else {"range": bounds, "scale": self.scale}

    @property
    def bounds(self) -> str:
        """Its ends, for people."""
        return f"[{self.low:g}, {self.high:g}]"

    def __str__(self) -> str:
        bounds = self.bounds
        return bounds if self.scale == "log" else f'{{ range = {bounds}, scale = "{self.scale}" }}'

    def _coordinate(self, value: float) -> float:
        """Grows with the value; the search is uniform in it."""
        return log(value) if self.scale == "log" else -log(1 - value)

    def _round(self, coordinate: float, digits: int = _DIGITS) -> float:
        if self.scale == "log":
            return float(f"{exp(coordinate):.{digits}g}")
        return round(1 - float(f"{exp(-coordinate):.{digits}g}"), 12)


Space = Mapping[str, Range]
"""Ranges by hyperparameter, `lr` first."""


def space(method: str, data: str, text: str | None = None) -> Space:
    """What is searched for a method on a data set.

    Args:
        method: Its name.
        data: The data set's.
        text: The TOML; by default the package's.
    """
    if text is None:
        text = files("locobench").joinpath("spaces.toml").read_text(encoding="utf-8")
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BenchError(f"spaces.toml is no TOML: {error}") from error
    section = sections.get(method, {})
    ranges = {name: entry for name, entry in section.items() if not _is_section(entry)}
    found = from_data({**ranges, **section.get(data, {})}, f"spaces.toml, [{method}]")
    if "lr" not in found:
        raise BenchError(f"spaces.toml has no range of lr for {method}; add: [{method}] lr = [LOW, HIGH]")
    return found


def from_data(ranges: Mapping[str, Any], place: str) -> Space:
    """The space of plain values, as `as_data` gives them; an error names the place."""
    found = {}
    for name, entry in ranges.items():
        try:
            bounds = entry["range"] if isinstance(entry, dict) else entry
            scale: Any = entry.get("scale", "log") if isinstance(entry, dict) else "log"
            low, high = (float(bound) for bound in bounds)
            if not (isfinite(low) and isfinite(high)) or isinstance(bounds, str):
                raise ValueError
            found[name] = Range(low, high, scale)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BenchError(
                f'{place}: {name} must be [low, high] or {{ range = [low, high], scale = "complement" }}, got {entry!r}'
            ) from None
        except BenchError as error:
            raise BenchError(f"{place}: {name}: {error}") from None
    return found


def as_data(ranges: Space) -> dict[str, Any]:
    """A space as plain values."""
    return {name: one.as_data() for name, one in ranges.items()}


def edges(ranges: Space, point: Mapping[str, float]) -> dict[str, Side]:
    """The hyperparameters of a point that are on the edge of the space."""
    found = {name: one.edge(point[name]) for name, one in ranges.items()}
    return {name: side for name, side in found.items() if side is not None}


def widened(ranges: Space, point: Mapping[str, float]) -> tuple[Space, Space]:
    """The space grown wherever the point is on its edge, and the part of it that is new in each of these directions."""
    whole, new = dict(ranges), dict(ranges)
    for name, side in edges(ranges, point).items():
        old = ranges[name]
        whole[name] = old.widened(side)
        new[name] = replace(whole[name], low=old.high) if side == "upper" else replace(whole[name], high=old.low)
    return whole, new


def _is_section(entry: Any) -> bool:
    return isinstance(entry, dict) and "range" not in entry
