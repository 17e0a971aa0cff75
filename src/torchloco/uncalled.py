"""Layers whose weights the model uses without calling their modules: they have no rows, and go to the fallback."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.attached import AttachedLayer
from torchloco.guards import is_nonzero
from torchloco.state import schedule_factor


def uncalled(layers: list[AttachedLayer]) -> list[AttachedLayer]:
    """Those with a gradient whose module was never called, if others were captured in this pass."""
    if not any(layer.recorder.collected() for layer in layers):
        return []  # the whole pass was not seen
    return [layer for layer in layers if layer.recorder.is_bypassed() and is_nonzero(layer.weight.grad)]


def warn_of_uncalled(layers: list[AttachedLayer], fallback: str) -> None:
    """Say once what becomes of them."""
    warnings.warn(
        f"{', '.join(layer.name for layer in layers)}: the model uses the weight without calling the module, so that "
        f"no rows are seen; {fallback} has the parameters from now on. Code that torch.compile had compiled before "
        "LocoProp was built looks the same: then build LocoProp first",
        stacklevel=6,
    )


class Adopted:
    """Groups of the fallback with parameters of LocoProp's groups, which stay as they are for schedulers and states.

    Their learning rate is the fallback's own, and follows what a scheduler makes of that of LocoProp's group.
    """

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self._lrs: list[float] = []

    def add(self, group: dict[str, Any]) -> None:
        """Take in a group that the fallback has made."""
        self.groups.append(group)
        self._lrs.append(float(group["lr"]))

    def bind(self, fallback: Optimizer) -> None:
        """Let the fallback have them beside its own."""
        fallback.param_groups += self.groups

    def follow(self, group_of: Mapping[Parameter, dict[str, Any]]) -> None:
        """Follow the schedule."""
        for group, lr in zip(self.groups, self._lrs, strict=True):
            group["lr"] = lr * schedule_factor(group_of[group["params"][0]])
