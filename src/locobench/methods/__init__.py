"""The optimizers that the benchmark compares. To add one, add an entry to a list here and its space to spaces.toml."""

import difflib
from collections.abc import Mapping
from typing import get_args

from locobench.choices import MAIN_METHODS, STUDY_METHODS
from locobench.earlier import EarlierLocoProp
from locobench.errors import BenchError
from locobench.libraries import LOCOPROP
from locobench.methods.first_order import FIRST_ORDER_METHODS
from locobench.methods.locoprop import LOCOPROP_METHODS
from locobench.methods.method import Family, Method
from locobench.methods.second_order import SECOND_ORDER_METHODS
from locobench.methods.special_cases import SPECIAL_CASES

__all__ = ["FAMILIES", "METHODS", "PRICED", "Family", "Method", "family", "find", "find_all", "label"]

FAMILIES: tuple[Family, ...] = get_args(Family)
_LISTS: dict[Family, list[Method]] = {
    "LocoProp": LOCOPROP_METHODS,
    "first-order": FIRST_ORDER_METHODS,
    "second-order and matrix": SECOND_ORDER_METHODS,
    "special cases of LocoProp": SPECIAL_CASES,
}
METHODS: dict[str, Method] = {method.name: method for methods in _LISTS.values() for method in methods}

# Another implementation of LocoProp, for its price alone: its loop has no place for a schedule.
_EARLIER = Method(
    "locoprop-pypi",
    "LocoProp 0.1.0 of PyPI",
    lambda model, lr: EarlierLocoProp(model),
    lr=2e-5,
    cost=8.0,
    library=LOCOPROP,
    note="10 local steps, else its defaults",
)
PRICED: dict[str, Method] = {**METHODS, _EARLIER.name: _EARLIER}


def label(name: str) -> str:
    """A method's name for people; files may name one that is not here any more, which keeps its own."""
    return PRICED[name].label if name in PRICED else name


def family(name: str) -> Family:
    """Of what kind it is: the list that it is in. First-order methods scale each entry of the gradient on its own."""
    return next((kind for kind, methods in _LISTS.items() if any(method.name == name for method in methods)), "other")


def find(name: str, among: Mapping[str, Method] = METHODS) -> Method:
    """The method of that name, or an error that lists the known ones and the nearest."""
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name.lower(), among, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    raise BenchError(f"unknown method {name!r}; {hint}: {', '.join(among)}")


def find_all(names: str, among: Mapping[str, Method] = METHODS) -> list[Method]:
    """The methods of a comma-separated list, each once, in its order; `main`, `study` and `all` stand for several."""
    several = {"main": list(MAIN_METHODS), "study": list(STUDY_METHODS), "all": list(among)}
    parts = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [name for part in parts for name in several.get(part, [part])]
    if not wanted:
        raise BenchError(f"no method named; there are: {', '.join(among)}")
    return [find(name, among) for name in dict.fromkeys(wanted)]
