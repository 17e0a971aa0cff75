"""The local loss of a single unit, by the library's own losses: what the figures of local losses show."""

import torch
from torch import Tensor

from torchloco import SquaredLoss, Transfer
from torchloco.losses import Loss


def unit_losses(loss: Loss, transfer: Transfer, predictions: Tensor, target: float) -> Tensor:
    """The loss at each prediction less that at the target, which may be a constant of F* that nobody needs to know.

    Args:
        loss: Of the layer.
        transfer: The unit's, elementwise.
        predictions: Pre-activations, in one dimension.
        target: A pre-activation, too.
    """
    goal = torch.tensor(target, dtype=predictions.dtype)
    wanted = goal if isinstance(loss, SquaredLoss) else transfer(goal)

    def value(prediction: Tensor) -> Tensor:
        return loss.value(prediction.reshape(1, 1), wanted.reshape(1, 1), transfer)

    return torch.vmap(value)(predictions) - value(goal)
