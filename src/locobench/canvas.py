"""Figures that are drawn without a window, and that show names as they are."""

import warnings
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Names come from files and from users; a dollar sign in one would begin a formula.
matplotlib.rcParams["text.parse_math"] = False
warnings.filterwarnings("ignore", "Glyph .* missing from")  # nor has the font each of their letters


def blank(**settings: Any) -> Figure:
    """An empty figure, laid out so that nothing is cut off.

    Args:
        settings: Of matplotlib's Figure, such as its size.
    """
    figure = Figure(layout="constrained", **settings)
    FigureCanvasAgg(figure)
    return figure
