"""Which settings to try next, and which trials to end early; Optuna's samplers and pruner do the thinking.

Trials come in rounds: half of them at once, then a quarter and a quarter. What a round holds, and whether one of its
trials is ended early, depends on the rounds before it alone. Trial k is therefore the same however many processes work
on a study and however often they are interrupted.
"""

import warnings
import zlib
from collections.abc import Sequence
from math import ceil
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from locobench.runfile import Row
from locobench.spaces import Range, Space

SAMPLER = (
    "first the method's default; then scrambled Sobol points up to half of the trials; then two rounds of Optuna's "
    "TPESampler (multivariate), each from all rounds before it"
)
PRUNER = (
    "Optuna's PercentilePruner: from 60 % of the epochs on, a trial ends whose best train loss is worse than that of "
    "three quarters of the method's earlier rounds at the same epoch, once four of these are finished"
)
_KEPT, _STARTUP, _WARM_UP = 75.0, 4, 0.6

Point = dict[str, float]


def round_starts(trials: int) -> list[int]:
    """The first trial of each round, and the end of the last."""
    half = ceil(trials / 2)
    return sorted({0, half, half + ceil((trials - half) / 2), trials})


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna has it; a range of 1 - value is one of a hyperparameter `1-NAME`."""
    return {_name(name, one): _distribution(one) for name, one in space.items()}


def to_optuna(space: Space, point: Point) -> dict[str, float]:
    """A point by Optuna's names; the last digits of a complement may lie just outside, where rounding put them."""
    found = {}
    for name, one in space.items():
        bounds = _distribution(one)
        value = point[name] if one.scale == "log" else 1 - point[name]
        found[_name(name, one)] = min(max(value, bounds.low), bounds.high)
    return found


def from_optuna(params: dict[str, float]) -> Point:
    """A point by the method's names."""
    return {
        name.removeprefix("1-"): round(1 - value, 12) if name.startswith("1-") else value
        for name, value in params.items()
    }


def sobol_points(space: Space, count: int, seed: str) -> list[Point]:
    """Points that cover the space evenly."""
    if count == 0:
        return []
    sobol: Any = torch.quasirandom.SobolEngine  # it has no types
    draw = sobol(len(space), scramble=True, seed=zlib.crc32(seed.encode())).draw
    return [
        {name: one.value(position) for (name, one), position in zip(space.items(), positions, strict=True)}
        for positions in draw(count).tolist()
    ]


def promising(space: Space, history: Sequence[FrozenTrial], count: int, seed: str) -> list[Point]:
    """Points near to the best so far and to what is not known yet, all from the same history."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=1, multivariate=True, constant_liar=True, seed=zlib.crc32(seed.encode())
        )
    study = _study(history, sampler=sampler)
    asked = [from_optuna(study.ask(distributions(space)).params) for _ in range(count)]
    return [{name: one.value(one.position(point[name])) for name, one in space.items()} for point in asked]


def is_hopeless(rows: Sequence[Row], epochs: int, history: Sequence[FrozenTrial]) -> bool:
    """Whether a trial with these epochs is not worth the rest of its epochs.

    Lenient, for the rate decays to 0: a large one looks worse in the middle of a run than it ends.
    """
    pruner = optuna.pruners.PercentilePruner(_KEPT, _STARTUP, n_warmup_steps=ceil(_WARM_UP * epochs))
    trial = _study(history, pruner=pruner).ask()
    for row in rows:
        trial.report(row["train_loss"], row["epoch"])
    return len(rows) < epochs and trial.should_prune()


def _study(
    history: Sequence[FrozenTrial],
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Study:
    """A study in memory with nothing but the history in it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.add_trials([_known(trial) for trial in history])
    return study


def _known(trial: FrozenTrial) -> FrozenTrial:
    """A trial that has ended, as samplers look at it: to diverge is the worst of values."""
    failed = trial.state == TrialState.FAIL
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if failed else trial.state,
        value=float("inf") if failed else trial.value,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
    )


def _name(name: str, one: Range) -> str:
    return name if one.scale == "log" else f"1-{name}"


def _distribution(one: Range) -> FloatDistribution:
    low, high = (one.low, one.high) if one.scale == "log" else (1 - one.high, 1 - one.low)
    return FloatDistribution(low, high, log=True)
