"""What the benchmark knows of an optimizer."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from locobench import problems
from locobench.errors import BenchError
from locobench.libraries import Library
from locobench.schedules import Schedule, linear_decay
from locobench.stepping import close, evaluating, take_step

Family = Literal["LocoProp", "first-order", "second-order and matrix", "special cases of LocoProp", "other"]


@dataclass(frozen=True)
class Method:
    """An optimizer with the settings that the benchmark gives it.

    Attributes:
        name: What `--methods` calls it.
        label: What tables and plots call it.
        build: Makes it, from a model and a base learning rate; its further arguments are hyperparameters, and their
            defaults are the method's. The optimizer may have `step_on(batch)`, if it must see the images, and
            `train()` and `eval()`, if it has other weights for evaluation: the loop uses what there is.
        lr: Base learning rate where none was searched for.
        searched: Base learning rates by data set, the best of an equal search (results/curves-search).
        cost: Rough price of a step in steps of Adam; it only steers the estimate of the time left.
        period: Steps after which its work repeats, where they are not all alike; a price is the mean over them.
        schedule: Of its learning rate.
        library: What it needs besides torch and torchloco.
        note: Its other settings, in words.
        caution: What to know before it runs on this machine's processor, None where there is nothing.
    """

    name: str
    label: str
    build: Callable[..., Optimizer]
    lr: float
    note: str
    searched: dict[str, float] = field(default_factory=dict)
    cost: float = 1.0
    period: int = 1
    schedule: Schedule = linear_decay
    library: Library | None = None
    caution: str | None = None

    @property
    def missing(self) -> str | None:
        """The command that installs its library, None where nothing is missing."""
        return self.library.install if self.library is not None and self.library.missing else None

    @property
    def params(self) -> dict[str, Any]:
        """Its hyperparameters besides the learning rate, with their defaults."""
        _model, _lr, *others = inspect.signature(self.build).parameters.values()
        return {argument.name: argument.default for argument in others}

    def rate(self, data: str) -> float:
        """The base learning rate on that data set, unless `--lr` gives another."""
        return self.searched.get(data, self.lr)

    def check(self, lr: float, params: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that it does not have, or whose values it does not take."""
        known = self.params
        for name in params:
            if name not in known:
                has = f"it has: {', '.join(known)}" if known else "it has none besides its learning rate"
                raise BenchError(f"unknown hyperparameter {name!r} of {self.name}; {has}")
        if params and self.missing is None:
            try:
                self._try_out(lr, params)
            except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
                raise BenchError(f"{self.name} does not take {written(params)}: {error}") from error

    def _try_out(self, lr: float, params: Mapping[str, Any]) -> None:
        """Build it, and take a step on something small and an evaluation: some settings are refused by these alone."""
        close(self.build(problems.Autoencoder(4, [3, 2], "tanh"), lr, **params))
        with torch.random.fork_rng(devices=[]):  # nothing else draws other numbers for it
            torch.manual_seed(0)
            model = problems.Autoencoder(4, [3, 2], "tanh")
            optimizer = self.build(model, self.lr, **params)  # how far a step goes is no matter of these
            try:
                take_step(model, optimizer, torch.full((5, 4), 0.5))
                with evaluating(optimizer):
                    pass
            finally:
                close(optimizer)

    def options(self, lr: float, params: Mapping[str, Any]) -> dict[str, Any]:
        """What its optimizer is set to with these hyperparameters: those and the ones that nobody can choose."""
        optimizer = self.build(problems.Autoencoder(4, [3, 2], "tanh"), lr, **params)
        try:
            return described(optimizer)
        finally:
            close(optimizer)


def described(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's class and everything it was set to, as JSON values.

    Some libraries keep settings as attributes and not among the defaults; a pair has those of its parts.
    """
    public = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
    found = {**public, "class": type(optimizer).__name__, **optimizer.defaults}
    for part in getattr(optimizer, "parts", ()):
        found |= {f"{type(part).__name__}.{name}": value for name, value in described(part).items()}
    for part in ("loss", "target", "solver", "regularizer", "outer"):
        if hasattr(optimizer, part):
            found[part] = repr(getattr(optimizer, part))
    return {
        key: list(value) if isinstance(value, tuple) else str(value) if value == inf else value
        for key, value in found.items()
        if value is None or isinstance(value, str | int | float | bool | tuple)
    }


def written(params: Mapping[str, Any]) -> str:
    """Hyperparameters as tables show them: lr 5e-5, momentum 0.998."""
    return ", ".join(f"{name} {_number(value)}" for name, value in params.items())


def _number(value: float) -> str:
    """With nine digits at most, which is more than those have that a search tries."""
    if 1e-2 <= abs(value) < 1e5 or value == 0:
        return f"{value:.9g}"
    digits, _, power = f"{value:.8e}".partition("e")
    return f"{float(digits):g}e{int(power)}"
