"""What the second-order figure shows: its directions and its series, by their keys in the file of numbers."""

from typing import NamedTuple

from locobench.styles import Style

DIRECTIONS = {"foof": "FOOF", "kfac": "K-FAC", "gauss-newton": "Gauss-Newton"}


class Series(NamedTuple):
    """Updates of one loss and one local optimizer.

    Attributes:
        label: For readers.
        style: How they are drawn.
    """

    label: str
    style: Style


# By loss and local optimizer; "carried" is the state that training left.
SERIES = {
    "squared plain": Series("LocoProp-S, plain steps", Style("#0072B2", "o")),
    "matching plain": Series("LocoProp-M, plain steps", Style("#D55E00", "s")),
    "squared rmsprop": Series("LocoProp-S, RMSProp", Style("#56B4E9", "o")),
    "matching rmsprop": Series("LocoProp-M, RMSProp", Style("#E69F00", "s")),
    "matching carried": Series("LocoProp-M, RMSProp with the state of training", Style("#009E73", "D")),
}
