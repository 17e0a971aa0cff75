"""How a method is drawn, the same in every plot."""

import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Colour, marker and line.

    Attributes:
        colour: Told apart with any kind of colour vision as far as so many can be; marker and line say it once more.
        marker: matplotlib's name.
        line: plotly's name of the dash.
    """

    colour: str
    marker: str
    line: str = "solid"

    @property
    def symbol(self) -> str:
        """The marker in plotly's words."""
        return _SYMBOLS[self.marker]

    @property
    def linestyle(self) -> str:
        """The line in matplotlib's words."""
        return _LINESTYLES[self.line]


_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "d": "diamond-tall",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon",
    "8": "octagon",
    "X": "x",
}
_LINESTYLES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}

# Okabe and Ito's colours and shades of them: LocoProp warm, first-order cool and grey, the others green to purple.
_STYLES = {
    "locoprop-m": Style("#D55E00", "o"),
    "locoprop-s": Style("#E69F00", "o"),
    "locoprop-m-centered": Style("#67000D", "X"),
    "locoprop-m-normalized": Style("#E31A1C", "D"),
    "locoprop-m-fast": Style("#A63600", "s", "dash"),
    "locoprop-s-fast": Style("#B8860B", "s", "dash"),
    "locoprop-s-exact": Style("#7F2704", "D", "dot"),
    "locoprop-spectral": Style("#C2185B", "^", "dashdot"),
    "sgd": Style("#999999", "v"),
    "momentum": Style("#0072B2", "s"),
    "nesterov": Style("#56B4E9", "D"),
    "adagrad": Style("#CC79A7", "^"),
    "rmsprop": Style("#009E73", "p"),
    "rmsprop-tf": Style("#005040", "h"),
    "adam": Style("#222222", "<"),
    "adamw": Style("#555555", ">", "dash"),
    "nadam": Style("#34618C", "X", "dash"),
    "schedule-free": Style("#3A87B7", "8", "dot"),
    "muon": Style("#7A4B9A", "d", "dashdot"),
    "shampoo": Style("#882255", "^", "dashdot"),
    "soap": Style("#AA4499", "s", "dashdot"),
    "kfac": Style("#332288", "p", "dashdot"),
    "foof": Style("#117733", "D", "dashdot"),
    "locoprop-s-bf16": Style("#FFB000", "v", "dot"),
    "locoprop-m-adam": Style("#E34A33", "^", "dash"),
    "locoprop-m-anderson": Style("#FD8D3C", "h", "dot"),
    "locoprop-s-cg": Style("#B30059", "p", "dash"),
    "proxprop": Style("#8C6D31", "s", "dashdot"),
    "implicit-sgd": Style("#5D6D1E", "o", "dashdot"),
    "exponentiated-gradient": Style("#7D3C98", "X", "dot"),
    "backprop": Style("#1B7F8C", "d", "dot"),
    "sgd-momentum": Style("#4A6FE3", "h", "dot"),
    "locoprop-pypi": Style("#806000", "8", "dash"),
    "foof-curvlinops": Style("#44AA99", "v", "dashdot"),
}
_SPARE = (Style("#8C6D31", ">"), Style("#5D6D1E", "8"), Style("#7D3C98", "d"), Style("#1B7F8C", "h"))


def style(method: str) -> Style:
    """How a method is drawn; one without a style of its own gets a spare one, always the same."""
    return _STYLES.get(method) or _SPARE[zlib.crc32(method.encode()) % len(_SPARE)]
