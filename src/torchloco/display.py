"""What `repr(optimizer)` shows: for every layer, what was decided and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchloco.losses import Loss
from torchloco.solvers import Solver
from torchloco.targets import TargetRule
from torchloco.transfers import Transfer

if TYPE_CHECKING:
    from torchloco.optimizer import LocoProp


@dataclass(frozen=True)
class LayerInfo:
    """What was decided for a layer.

    Args:
        name: Its name in the model.
        shape: (d_out, d_in) of its weight.
        transfer: Its transfer function; None until the first forward pass shows it.
        source: How the transfer was found.
        loss: The local loss.
        target: The rule for the local target.
        solver: The solver.
        multiply_adds: What the solver spends on the layer's problem per step, on as many rows as the last one had; None
            before the first step, and where the solver does not say.
    """

    name: str
    shape: tuple[int, int]
    transfer: Transfer | None
    source: str
    loss: Loss
    target: TargetRule
    solver: Solver
    multiply_adds: int | None = None


def describe(optimizer: LocoProp) -> str:
    """A table of the layers, the param groups' options, and the fallback with its parameters."""
    header = ("layer", "out × in", "transfer", "loss", "target", "multiply-adds", "found by")
    rows = [
        (
            info.name,
            f"{info.shape[0]} × {info.shape[1]}",
            info.transfer.name if info.transfer else "?",
            info.loss.name,
            repr(info.target),
            "?" if info.multiply_adds is None else _short(info.multiply_adds),
            info.source + (": not monotone" if info.transfer and not info.transfer.monotone else ""),
        )
        for info in optimizer.layers
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["LocoProp("]
    lines += [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in [header, *rows]
    ]
    if not rows:
        return "LocoProp(closed)"
    lines.append(f"  solver: {optimizer.solver!r}")
    if optimizer.regularizer is not None:
        lines.append(f"  regularizer: {optimizer.regularizer!r}")
    if optimizer.outer is not None:
        lines.append(f"  outer: {optimizer.outer!r}")
    if optimizer.safe:
        lines.append("  safe: no solve leaves a local objective above its old value")
    if optimizer.parallel:
        lines.append("  parallel: several layers are solved at the same time")
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("fallback"):
            options = ", ".join(f"{key}={float(group[key]):g}" for key in ("lr", "activation_lr", "local_steps"))
            lines.append(f"  group {i}: {options}; {len(group['params'])} parameters")
    names = optimizer.fallback_parameters
    if names:
        shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
        lines.append(f"  fallback: {optimizer.fallback_name} for {shown}")
    return "\n".join([*lines, ")"])


def _short(count: int) -> str:
    """A large count with three digits: 12.7 G."""
    value, units = float(count), ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}".strip()
