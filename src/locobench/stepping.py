"""One step of training: what the benchmark times."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locobench import problems


def take_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """One step of training. Returns the loss before the step.

    An optimizer that must see the images has a method `step_on(batch)`, which is the whole step.
    """
    step_on = getattr(optimizer, "step_on", None)
    if step_on is None:
        return plain_step(model, optimizer, batch)
    loss: Tensor = step_on(batch)
    return loss


def plain_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """The step of an optimizer that needs nothing but gradients (and what its hooks see)."""
    optimizer.zero_grad()
    loss = problems.loss(model(batch), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


@contextmanager
def evaluating(optimizer: Optimizer) -> Iterator[None]:
    """Let the model have the weights that are evaluated, where an optimizer trains at others."""
    to_evaluation, to_training = (getattr(optimizer, mode, None) for mode in ("eval", "train"))
    if to_evaluation is None or to_training is None:
        yield
        return
    to_evaluation()
    try:
        yield
    finally:
        to_training()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def close(optimizer: Optimizer) -> None:
    """Take an optimizer's hooks off its model, if it is of a kind that has some."""
    release = getattr(optimizer, "close", None)
    if release is not None:
        release()
