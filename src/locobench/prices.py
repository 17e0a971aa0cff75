"""What steps cost, as it was measured: the numbers, their table and their file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from locobench import plain_json
from locobench.errors import BenchError
from locobench.markdown import markdown_table
from locobench.methods import Method, family
from locobench.runfile import is_count, is_number, write_atomically
from locobench.settings import counted_threads, machine, machine_name, versions

SIZES = frozenset({"width", "depth", "batch_size"})  # of what is trained: a row of prices has them all or, alone, none
_DEAREST = 1e9  # times Adam's price, more than anyone has waited for
_HEADINGS = (  # broken so that names keep their room on 80 columns
    *("ms/\nstep", "time\n÷ Adam", "GFLOP/s", "share\nof peak"),
    *("state\nMB", "bytes\n÷ Adam", "peak\nMB", "peak\n÷ Adam"),
)


@dataclass
class Price:
    """What was measured of one method.

    Attributes:
        method: The method.
        seconds: Of a step, one number a round.
        adam_seconds: Of the steps of Adam next to it, one number a round.
        state_bytes: What the optimizer holds between steps.
        adam_state_bytes: The same of Adam.
        peak_bytes: The most that training held at a time besides model and batch, None where torch does not tell.
        adam_peak_bytes: The same of Adam.
        multiply_adds: Of a step in matrix products, None where that is not known.
        trouble: Why there are no numbers, None where there are.
    """

    method: Method
    seconds: list[float] = field(default_factory=list)
    adam_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    adam_state_bytes: int = 0
    peak_bytes: int | None = None
    adam_peak_bytes: int | None = None
    multiply_adds: int | None = None
    trouble: str | None = None

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return median(self.seconds)

    @property
    def time_ratio(self) -> float:
        """Median over the rounds of the step's time divided by that of Adam's steps next to it."""
        return median(own / adam for own, adam in zip(self.seconds, self.adam_seconds, strict=True))

    @property
    def time_spread(self) -> float | None:
        """Standard deviation of that over the rounds, None where there is one."""
        ratios = [own / adam for own, adam in zip(self.seconds, self.adam_seconds, strict=True)]
        return stdev(ratios) if len(ratios) > 1 else None

    @property
    def bytes_ratio(self) -> float:
        """State bytes divided by Adam's."""
        return self.state_bytes / self.adam_state_bytes

    @property
    def peak_ratio(self) -> float | None:
        """Peak bytes divided by Adam's."""
        return self.peak_bytes / self.adam_peak_bytes if self.peak_bytes and self.adam_peak_bytes else None

    @property
    def gflops(self) -> float | None:
        """Achieved in matrix products, two operations a multiply-add; None where they are not known."""
        return None if self.multiply_adds is None else 2e-9 * self.multiply_adds / self.step

    def as_row(self) -> dict[str, Any]:
        """As plain JSON values."""
        if self.trouble is not None:
            return {"method": self.method.name, "trouble": self.trouble}
        return {
            "method": self.method.name,
            "step_seconds": self.step,
            "time_ratio": self.time_ratio,
            "time_spread": self.time_spread,
            "state_bytes": self.state_bytes,
            "bytes_ratio": self.bytes_ratio,
            "peak_bytes": self.peak_bytes,
            "peak_ratio": self.peak_ratio,
            "multiply_adds": self.multiply_adds,
            "gflops": self.gflops,
            "round_seconds": self.seconds,
            "round_adam_seconds": self.adam_seconds,
        }


@dataclass
class Section:
    """The prices of steps of one size.

    Attributes:
        width: By which the hidden widths are multiplied.
        depth: By which the number of 500 layers is multiplied.
        batch_size: Images per step.
        prices: What was measured.
        peak: The machine's best at the same products; see `products.Peak.as_row`.
    """

    width: int
    depth: int
    batch_size: int
    prices: list[Price] = field(default_factory=list)
    peak: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> dict[str, int]:
        """What tells sections apart."""
        return {"width": self.width, "depth": self.depth, "batch_size": self.batch_size}

    @property
    def title(self) -> str:
        """For people."""
        return f"width ×{self.width}, depth ×{self.depth}, batch {self.batch_size}"


def table(sections: list[Section], title: str) -> Table:
    """For a rich console, cheapest first in each section."""
    drawn = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
    drawn.add_column("method", max_width=50)
    for heading in _HEADINGS:
        drawn.add_column(heading, justify="right")
    for section in sections:
        if len(sections) > 1:
            drawn.add_row(section.title, style="bold")
        for cells, style in _rows(section):
            drawn.add_row(*cells, style=style)
        drawn.add_section()
    return drawn


def markdown(sections: list[Section], title: str) -> str:
    """The same for a page."""
    lines = [f"{title}."]
    headings = [heading.replace("/\n", "/").replace("\n", " ") for heading in ("method", *_HEADINGS)]
    for section in sections:
        rows = [cells for cells, _ in _rows(section)]
        lines += ["", f"{section.title}:", "", markdown_table(headings, rows)]
    return "\n".join(lines) + "\n"


def _rows(section: Section) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Cells and style of a section's lines."""
    peak = section.peak["gflops"]
    for price in sorted((price for price in section.prices if price.trouble is None), key=lambda p: p.time_ratio):
        style = "bold" if family(price.method.name) == "LocoProp" else None
        yield (price.method.label, *_cells(price, peak)), style
    for price in section.prices:
        if price.trouble is not None:
            yield (f"{price.method.label}: {price.trouble}",), "dim"
    yield ("matrix products alone", "", "", f"{peak:.1f}", "100 %"), "dim"


def _cells(price: Price, peak: float) -> tuple[str, ...]:
    return (
        f"{1000 * price.step:.1f}",
        f"{price.time_ratio:.2f}",
        "" if price.gflops is None else f"{price.gflops:.1f}",
        "" if price.gflops is None else f"{100 * price.gflops / peak:.0f} %",
        f"{price.state_bytes / 1e6:.1f}",
        f"{price.bytes_ratio:.2f}",
        "" if price.peak_bytes is None else f"{price.peak_bytes / 1e6:.1f}",
        "" if price.peak_ratio is None else f"{price.peak_ratio:.2f}",
    )


def save(sections: list[Section], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the measurement with machine and versions as JSON; returns its content."""
    content = {
        **settings,
        "versions": versions(),
        "machine": machine(settings["device"]),
        "peaks": [{**section.size, **section.peak} for section in sections],
        "prices": [{**section.size, **price.as_row()} for section in sections for price in section.prices],
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return content


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `save` wrote, with at least the rows of its prices.

    Raises:
        BenchError: The file cannot be read or is none of those.
    """
    try:
        content: dict[str, Any] = plain_json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        if not isinstance(content.get("machine", {}), dict):
            raise ValueError(f"machine is {content['machine']!r}")
        if not isinstance(content["prices"], list) or not content["prices"]:
            raise ValueError("it has no list of prices")
        for row in content["prices"]:
            _check(row)
        if len({SIZES.intersection(row) for row in content["prices"]}) > 1:
            raise ValueError(f"some prices have {', '.join(sorted(SIZES))} and some have not")
        return content
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is no file of `locobench speed`: {error!r}") from error


def _check(row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row["method"], str):
        raise ValueError(f"one of the prices is {row!r}")
    if SIZES.intersection(row) not in (frozenset(), SIZES):
        raise ValueError(f"{row['method']} has only some of {', '.join(sorted(SIZES))}")
    sizes = [row[key] for key in sorted(SIZES.intersection(row))]
    if not all(is_count(size, 1) for size in sizes):
        raise ValueError(f"the sizes of {row['method']} are {sizes!r}")
    if "trouble" in row:
        return
    if not is_number(row["time_ratio"]) or not 0 < row["time_ratio"] <= _DEAREST:
        raise ValueError(f"the price of {row['method']} is {row['time_ratio']!r}")
    for key in ("bytes_ratio", "time_spread"):
        value = row.get(key)
        if value is not None and (not is_number(value) or value < 0):
            raise ValueError(f"{key} of {row['method']} is {value!r}")


def rows_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that have a price by method, from the first section of what `read` returned."""
    rows = content["prices"]
    return {
        row["method"]: row
        for row in rows
        if "trouble" not in row and all(row.get(key) == rows[0].get(key) for key in SIZES)
    }


def measured_on(content: dict[str, Any]) -> str:
    """On what they were measured, in words."""
    name, rounds = machine_name(content.get("machine", {})), content.get("rounds", "?")
    return f"{name}, {counted_threads(content.get('threads', '?'))}, {rounds} round{'' if rounds == 1 else 's'}"


def read_prices(path: Path) -> dict[str, float]:
    """Time ÷ Adam's by method, from the first section of a file that `save` wrote.

    Raises:
        BenchError: The file cannot be read or is none of those.
    """
    return {method: float(row["time_ratio"]) for method, row in rows_of(read(path)).items()}
