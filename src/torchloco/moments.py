"""The inputs' second moments C / N, averaged over mini-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.inputs import Inputs
from torchloco.solvers import Task


def rows_of_groups(inputs: Inputs) -> Tensor:
    """How many rows each group has, at least 1; (g, 1, 1)."""
    return torch.tensor(inputs.group_rows).clamp_min(1)[:, None, None]


def averaged_moments(inputs: Inputs, task: Task, average: float) -> Tensor:
    """C / N of each group, (g, d_in, d_in), as a running average that the layer keeps between steps as "gram".

    Groups whose inputs are all zero, or that have no rows, keep their average.

    Args:
        inputs: X, in the precision of the result.
        task: Whose memory has the average of the steps before.
        average: Its decay, in [0, 1); 0 uses this mini-batch alone, and keeps nothing.
    """
    gram = inputs.gram().view(-1, inputs.d_in, inputs.d_in)
    gram = gram / rows_of_groups(inputs).to(gram)
    past = task.memory.get("gram")
    if past is not None and past.shape == gram.shape:
        past = past.to(gram)
        gram = torch.where(gram.flatten(1).any(1)[:, None, None], torch.lerp(gram, past, average), past)
    if average:
        task.keep["gram"] = gram
    return gram
