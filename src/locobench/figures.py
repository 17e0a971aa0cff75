"""Figures about the method itself, computed by the library's own parts."""

from pathlib import Path

import torch

from locobench import canvas
from locobench.errors import BenchError
from locobench.runfile import write_atomically
from locobench.unit_loss import unit_losses
from torchloco import MatchingLoss, SquaredLoss, Transfer, get_transfer

_TARGETS = (-2.0, -0.5, 0.5, 2.0)  # pre-activations
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


def local_losses(names: list[str], path: Path) -> Path:
    """Draw the loss of a layer as a function of its prediction, for a few targets, next to the squared loss.

    Args:
        names: Transfer functions, one panel each.
        path: The PNG.

    Raises:
        BenchError: An unknown transfer, one without a matching loss of a single unit, or a path that cannot be written.
    """
    transfers = [_transfer(name) for name in names]
    figure = canvas.blank(figsize=(3.6 * (len(names) + 1), 3.6))
    axes = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    predictions = torch.linspace(-3, 3, 301, dtype=torch.float64)
    for panel, transfer in zip(axes, [*transfers, None], strict=True):
        for target, colour in zip(_TARGETS, _COLOURS, strict=True):
            if transfer is None:
                losses = unit_losses(SquaredLoss(), get_transfer("identity"), predictions, target)
            else:
                losses = unit_losses(MatchingLoss(), transfer, predictions, target)
            panel.plot(predictions.numpy(), losses.numpy(), color=colour, label=f"target {target:g}")
        panel.set_title("squared loss" if transfer is None else f"matching loss of {transfer.name}")
        panel.set_xlabel("predicted pre-activation")
        panel.set_ylim(-0.1, 5)
    axes[0].set_ylabel("local loss")
    axes[0].legend(fontsize="x-small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _transfer(name: str) -> Transfer:
    try:
        transfer = get_transfer(name)
    except ValueError as error:
        raise BenchError(str(error)) from error
    if not (transfer.elementwise and transfer.monotone and transfer.integral):
        raise BenchError(f"{name} has no matching loss of a single unit; take a monotone, elementwise transfer")
    return transfer
