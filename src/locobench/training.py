"""One run of the benchmark, an epoch at a time: the same problem for every method, and a fair clock."""

import contextlib
import re
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from locobench import problems
from locobench.data import Images
from locobench.errors import BenchError
from locobench.methods import Method, find
from locobench.settings import Settings, use_device
from locobench.stepping import close, evaluating, synchronize, take_step

_REFUSAL = re.compile("finite|diverge|overflow|factorised|ill-conditioned", re.IGNORECASE)  # how an optimizer words it


class Diverged(Exception):
    """The loss is not a finite number any more, or the optimizer refused a step because of that."""


class Training:
    """The state of a run between two epochs.

    Args:
        settings: The run's settings.
        images: Its data; moved to the device if it is not there.

    Attributes:
        epoch: Epochs done.
        seconds: Spent on training so far: the steps alone, without gathering of batches and evaluation.
        shape: Height and width of an image.
        steps_per_epoch: A last, partial batch is dropped.
        parameters: How many numbers are trained.
    """

    def __init__(self, settings: Settings, images: Images) -> None:
        if settings.batch_size > len(images.train):
            raise BenchError(f"--batch-size {settings.batch_size} is more than the {len(images.train)} training images")
        self.settings = settings
        self.device = use_device(settings.device, settings.threads)
        self.shape = images.shape
        self.train, self.test = images.train.to(self.device), images.test.to(self.device)
        self.steps_per_epoch = len(images.train) // settings.batch_size
        self.epoch, self.seconds = 0, 0.0
        self._method: Method = find(settings.method)
        self.model, self.optimizer, self.scheduler = self._start()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def train_epoch(self, on_step: Callable[[float], None] | None = None) -> dict[str, Any]:
        """Train for an epoch, then evaluate; returns the epoch's row.

        Args:
            on_step: Called after each step, off the clock, with the step's loss.

        Raises:
            Diverged: When a loss is not finite or the optimizer refuses to step for such a reason.
        """
        order = self._seed_epoch(self.epoch)
        lr = self.settings.lr * self._method.schedule(self.epoch * self.steps_per_epoch, self._schedule_steps)
        for step in range(self.steps_per_epoch):
            batch = order[step * self.settings.batch_size :][: self.settings.batch_size]
            loss = self._timed_step(self.train[batch.to(self.device)])
            if on_step is not None:
                on_step(loss)
        with evaluating(self.optimizer):
            row = {
                "method": self.settings.method,
                "epoch": self.epoch + 1,
                "seconds": self.seconds,
                "train_loss": self._evaluate("train", self.train),
                "test_loss": self._evaluate("test", self.test),
                "lr": lr,
            }
        self.epoch += 1
        return row

    def initial_loss(self) -> float:
        """Train loss of the model as it is, off the clock."""
        return problems.mean_loss(self.model, self.train)

    def warm_up(self) -> None:
        """Take two steps with a copy of everything and throw it away.

        What a process does only once (libraries starting their threads, choosing their kernels) is thus not
        charged to the method that happens to come first.
        """
        self._seed_epoch(0)
        model, optimizer, _ = self._start()
        # A refused step is reported when it happens in earnest.
        with contextlib.suppress(RuntimeError, ValueError, ArithmeticError):
            for _ in range(2):
                take_step(model, optimizer, self.train[: self.settings.batch_size])
        close(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs in order to go on as if nothing had happened."""
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Let go of the model, where the optimizer holds on to it."""
        close(self.optimizer)

    def _start(self) -> tuple[problems.Autoencoder, torch.optim.Optimizer, LambdaLR]:
        """Model, optimizer and schedule as they are before the first step."""
        settings = self.settings
        pixels = self.train.shape[1]
        model = problems.build(settings.model, settings.activation, pixels, settings.seed).to(self.device)
        optimizer = self._method.build(model, settings.lr, **settings.params)
        return model, optimizer, LambdaLR(optimizer, lambda step: self._method.schedule(step, self._schedule_steps))

    @property
    def _schedule_steps(self) -> int:
        return self.settings.schedule_epochs * self.steps_per_epoch

    def _seed_epoch(self, epoch: int) -> Tensor:
        """The epoch's order of the images.

        It depends on the seed and the epoch alone, so that a run that goes on from a checkpoint sees the same
        batches; the global generators are seeded for the sake of methods that draw random numbers.
        """
        seed = (self.settings.seed << 20) + epoch + 1
        torch.manual_seed(seed)
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))

    def _timed_step(self, batch: Tensor) -> float:
        synchronize(self.device)
        start = perf_counter()
        try:
            loss = take_step(self.model, self.optimizer, batch)
            self.scheduler.step()
        except RuntimeError as error:
            if _REFUSAL.search(str(error)):
                raise Diverged(str(error)) from error
            raise  # out of memory, say
        except (ValueError, ArithmeticError) as error:
            if isinstance(error, ValueError) and "math domain" not in str(error):  # a root of a negative number
                raise  # a mistake in a program is no divergence
            raise Diverged(f"{type(error).__name__}: {error}") from error
        synchronize(self.device)
        self.seconds += perf_counter() - start
        value = loss.item()
        if not _is_finite(value):
            raise Diverged(f"the loss of a batch in epoch {self.epoch + 1} is {value}")
        return value

    def _evaluate(self, name: str, images: Tensor) -> float:
        value = problems.mean_loss(self.model, images)
        if not _is_finite(value):
            raise Diverged(f"the {name} loss after epoch {self.epoch + 1} is {value}")
        return value


def _is_finite(value: float) -> bool:
    return value - value == 0
