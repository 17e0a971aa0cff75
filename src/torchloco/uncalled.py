"""Layers whose weights the model uses without calling their modules: they have no rows, and go to the fallback."""

from __future__ import annotations

import warnings

from torchloco.attached import AttachedLayer
from torchloco.guards import is_nonzero


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
