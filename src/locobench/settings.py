"""What decides the outcome of a run, and what is only worth knowing about it."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from locobench import __version__
from locobench.errors import BenchError
from locobench.runfile import LARGEST, MOST

# Raised when the same settings would no longer give the same numbers: results of two protocols do not mix.
PROTOCOL = 1
MOST_THREADS = 4096
MOST_SEED = (1 << 31) - 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's losses.

    Attributes:
        method: Name of the optimizer.
        lr: Its base learning rate.
        data: Name of the data set.
        model: Name of the autoencoder.
        activation: Of its hidden layers.
        epochs: To train.
        schedule_epochs: Length of the learning-rate schedule; at least `epochs`.
        batch_size: Images per step.
        train_size: Only so many images are used; None for all.
        seed: Of initial weights and batches.
        device: To train on, such as `cpu` or `cuda`.
        threads: That torch uses on the CPU.
        protocol: Version of the benchmark's rules.
        params: The optimizer's hyperparameters besides `lr`, where they are not the method's defaults.
    """

    method: str
    lr: float
    data: str
    model: str
    activation: str
    epochs: int
    schedule_epochs: int
    batch_size: int
    train_size: int | None
    seed: int
    device: str
    threads: int
    protocol: int = PROTOCOL
    params: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch_size=self.batch_size, threads=self.threads)
        at_least(self.epochs, schedule_epochs=self.schedule_epochs)
        at_least(0, seed=self.seed)
        if self.train_size is not None:
            at_least(1, train_size=self.train_size)
        if not 0 < self.lr < float("inf"):
            raise BenchError(f"the learning rate of {self.method} must be a positive number, got {self.lr}")
        if self.lr > 1e38:
            raise BenchError(f"the learning rate of {self.method} must be at most 1e38, got {self.lr}")
        for name, value in self.params.items():
            if not abs(value) <= LARGEST:
                raise BenchError(f"{name} of {self.method} must be a number of at most {LARGEST:g}, got {value}")
        at_most(MOST, epochs=self.epochs, schedule_epochs=self.schedule_epochs, batch_size=self.batch_size)
        if self.train_size is not None:
            at_most(MOST, train_size=self.train_size)
        at_most(MOST_SEED, seed=self.seed)
        at_most(MOST_THREADS, threads=self.threads)

    def as_row(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def at_least(smallest: int, **numbers: int) -> None:
    """Refuse the first number that is too small, by the name of its option."""
    for name, number in numbers.items():
        if number < smallest:
            raise BenchError(f"--{name.replace('_', '-')} must be at least {smallest}, got {number}")


def at_most(largest: int, **numbers: int) -> None:
    """Refuse the first number that is too large, by the name of its option."""
    for name, number in numbers.items():
        if number > largest:
            raise BenchError(f"--{name.replace('_', '-')} must be at most {largest}, got {number}")


def whole_numbers(option: str, text: str, largest: int, smallest: int = 1) -> list[int]:
    """The numbers of a comma-separated list, each once, within the bounds."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise BenchError(f"--{option} must be comma-separated whole numbers, such as 1,2,4; got {text!r}") from None
    for number in numbers:
        at_least(smallest, **{option: number})
        at_most(largest, **{option: number})
    return list(dict.fromkeys(numbers))


def use_device(name: str, threads: int) -> torch.device:
    """The device, checked by putting a number on it; sets torch's threads as well.

    Denormal numbers are flushed to zero, for every method alike: they cost up to a tenth of a step on CPUs.
    """
    at_least(1, threads=threads)
    at_most(MOST_THREADS, threads=threads)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # torch reports a device it was not built for with an AssertionError.
        reason = str(error).strip().splitlines()[0]
        raise BenchError(f"--device {name} is not available here: {reason}") from error
    return device


def default_threads() -> int:
    """What torch chooses, unless told otherwise, for this machine."""
    return torch.get_num_threads()


def counted_threads(count: object) -> str:
    """In words, for titles and notes."""
    return f"{count} thread{'' if count == 1 else 's'}"


def versions() -> dict[str, str]:
    """Of the software that decides the numbers."""
    return {"torchloco": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def machine(device: str) -> dict[str, Any]:
    """Of the hardware that decides the times; its vector instructions are the ones that torch uses."""
    about = {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # processors of one name may differ in them
        "cpus": os.cpu_count(),
        "system": platform.system(),
    }
    if torch.device(device).type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def machine_name(about: Mapping[str, Any]) -> str:
    """What `machine` found, in words: "AMD EPYC (AVX2)"; files of before instructions were noted do without."""
    if about.get("gpu"):
        return str(about["gpu"])
    instructions = about.get("instructions")
    return f"{about.get('cpu') or 'unknown machine'}{f' ({instructions})' if instructions else ''}"


def _cpu_name() -> str:
    """Linux tells the model only here; elsewhere the standard library knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
