"""The price of a step: every method timed next to Adam, in turns, in one process."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from locobench import problems
from locobench.errors import BenchError
from locobench.methods import Method, find
from locobench.runfile import write_atomically
from locobench.settings import machine, use_device, versions
from locobench.training import close, synchronize, take_step

WARM_UP_STEPS = 2


@dataclass
class Price:
    """What was measured of one method.

    Attributes:
        method: The method.
        seconds: Of a step, one number a round.
        adam_seconds: Of Adam's step just before, one number a round.
        state_bytes: What the optimizer holds between steps.
        adam_state_bytes: The same of Adam.
    """

    method: Method
    seconds: list[float] = field(default_factory=list)
    adam_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    adam_state_bytes: int = 0

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return median(self.seconds)

    @property
    def time_ratio(self) -> float:
        """Median over the rounds of the step's time divided by that of the Adam step just before it."""
        return median(own / adam for own, adam in zip(self.seconds, self.adam_seconds, strict=True))

    @property
    def bytes_ratio(self) -> float:
        """State bytes divided by Adam's."""
        return self.state_bytes / self.adam_state_bytes

    def as_row(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "method": self.method.name,
            "step_seconds": self.step,
            "time_ratio": self.time_ratio,
            "state_bytes": self.state_bytes,
            "bytes_ratio": self.bytes_ratio,
            "round_seconds": self.seconds,
            "round_adam_seconds": self.adam_seconds,
        }


class _Contestant:
    """A model of its own with its optimizer."""

    def __init__(self, method: Method, model: str, activation: str, batch: Tensor) -> None:
        self.model = problems.build(model, activation, batch.shape[1], seed=0).to(batch.device)
        self.optimizer = method.build(self.model, method.lr)
        self.batch = batch
        for _ in range(WARM_UP_STEPS):
            take_step(self.model, self.optimizer, batch)

    def time_step(self) -> float:
        synchronize(self.batch.device)
        start = perf_counter()
        take_step(self.model, self.optimizer, self.batch)
        synchronize(self.batch.device)
        return perf_counter() - start


def measure(
    methods: list[Method],
    *,
    model: str = "standard",
    activation: str = "tanh",
    batch_size: int = 1000,
    rounds: int = 7,
    device: str = "cpu",
    threads: int,
    on_round: Callable[[], None] | None = None,
) -> list[Price]:
    """Time steps (zero_grad, forward, backward, step) on the autoencoder with random images of 784 pixels.

    In a round each method's step comes right after one of Adam's: what else the machine does slows both down,
    and the ratio stays.

    Args:
        methods: To be timed; Adam is always the yardstick.
        model: Name of the autoencoder.
        activation: Of its hidden layers.
        batch_size: Images per step.
        rounds: Steps per method that are timed.
        device: To run on.
        threads: That torch uses on the CPU.
        on_round: Called after every pair of steps.
    """
    place = use_device(device, threads)
    batch = torch.rand(batch_size, 784, generator=torch.Generator().manual_seed(0)).to(place)
    adam = _Contestant(find("adam"), model, activation, batch)
    contestants = [(Price(method), _Contestant(method, model, activation, batch)) for method in methods]
    for _ in range(rounds):
        for price, contestant in contestants:
            price.adam_seconds.append(adam.time_step())
            price.seconds.append(contestant.time_step())
            if on_round is not None:
                on_round()
    for price, contestant in contestants:
        price.state_bytes = state_bytes(contestant.optimizer)
        price.adam_state_bytes = state_bytes(adam.optimizer)
        close(contestant.optimizer)
    return [price for price, _ in contestants]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, each storage once; parameters are not counted."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in _tensors(list(optimizer.state.values()))
    }
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Optimizer):  # an optimizer inside an optimizer
        yield from _tensors(list(value.state.values()))


def table(prices: list[Price], title: str) -> Table:
    """For a rich console, cheapest first."""
    drawn = Table(title=title, box=SIMPLE_HEAD)
    drawn.add_column("method")
    for heading in ("ms/step", "time ÷ Adam", "state MB", "bytes ÷ Adam"):
        drawn.add_column(heading, justify="right")
    for price in sorted(prices, key=lambda price: price.time_ratio):
        drawn.add_row(
            price.method.label,
            f"{1000 * price.step:.1f}",
            f"{price.time_ratio:.2f}",
            f"{price.state_bytes / 1e6:.1f}",
            f"{price.bytes_ratio:.2f}",
            style="bold" if price.method.name.startswith("locoprop") else None,
        )
    return drawn


def read_prices(path: Path) -> dict[str, float]:
    """Time ÷ Adam's by method, from a file that `save` wrote.

    Raises:
        BenchError: The file cannot be read or is none of those.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {row["method"]: float(row["time_ratio"]) for row in content["prices"]}
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is no file of `locobench speed`: {error!r}") from error


def save(prices: list[Price], settings: dict[str, Any], path: Path) -> None:
    """Write the measurement with machine and versions as JSON."""
    content = {
        **settings,
        "versions": versions(),
        "machine": machine(settings["device"]),
        "prices": [price.as_row() for price in prices],
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
