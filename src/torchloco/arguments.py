"""What a user may write for the loss, the target, the solver and the model's output, and what it stands for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from torchloco.losses import Loss, MatchingLoss, PostActivationLoss, SquaredLoss
from torchloco.objective import Objective
from torchloco.regularizers import Regularizer, check_regularizer
from torchloco.solvers import Solver
from torchloco.steps import FirstOrderSteps
from torchloco.targets import ModifiedTarget, Target, TargetRule, target_of
from torchloco.transfers import Transfer, get_transfer, nearest, transfer_names

LOSSES: dict[str, Callable[[], Loss]] = {"matching": MatchingLoss, "squared": SquaredLoss}

_CRITERIA: dict[Any, str] = {
    nn.BCEWithLogitsLoss: "sigmoid",
    F.binary_cross_entropy_with_logits: "sigmoid",
    nn.CrossEntropyLoss: "softmax",
    F.cross_entropy: "softmax",
    nn.MSELoss: "identity",
    F.mse_loss: "identity",
}


def resolve_loss(loss: str | Loss) -> Loss:
    """The loss of that name; an object is returned as it is.

    Raises:
        TypeError: Neither a name nor a `Loss`.
        ValueError: Unknown name.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be {' or '.join(map(repr, LOSSES))}, or a torchloco Loss, got {loss!r}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}{nearest(loss, list(LOSSES))}; known: {', '.join(LOSSES)}")
    return LOSSES[loss]()


def resolve_target(target: TargetRule | None, loss: Loss) -> TargetRule:
    """The given rule, or the target that goes with the loss.

    Raises:
        TypeError: Not callable.
        ValueError: None is given and none goes with this loss.
    """
    if target is not None and (isinstance(target, type) or not callable(target)):
        raise TypeError(f"target must be a callable of the layer's rows, such as MirrorTarget(), got {target!r}")
    own = target_of(loss)
    if isinstance(target, ModifiedTarget) and own is not None:
        target = target.of(own, replace=False)
    chosen = own if target is None else target
    if chosen is None:
        raise ValueError(
            f"no target goes with {loss!r} by itself; give target=, such as MirrorTarget(), which is about f(A)"
        )
    if isinstance(chosen, ModifiedTarget):
        _ = chosen.base  # raises if there is none
    _warn_if_apart(chosen, loss)
    return chosen


def _warn_if_apart(target: TargetRule, loss: Loss) -> None:
    """Warn if a target is about pre-activations and the loss about post-activations, or the other way round."""
    about = {SquaredLoss: SquaredLoss, MatchingLoss: MatchingLoss, PostActivationLoss: MatchingLoss}.get(type(loss))
    if isinstance(target, Target) and about is not None and target.loss is not about:
        own = "GradientTarget()" if about is SquaredLoss else "MirrorTarget()"
        warnings.warn(
            f"{target!r} does not belong to {loss!r}: it asks for a change even without a gradient. Its own is {own}",
            stacklevel=5,
        )


def resolve_objective(loss: str | Loss, target: TargetRule | None, regularizer: Regularizer | None) -> Objective:
    """The local objective that three arguments of `LocoProp` stand for.

    Raises:
        TypeError, ValueError: One of them is unsupported, or they do not go together.
    """
    resolved = resolve_loss(loss)
    if regularizer is not None:
        check_regularizer(regularizer)
    return Objective(resolved, resolve_target(target, resolved), regularizer)


def resolve_solver(solver: Solver | Callable[..., Optimizer] | None) -> Solver:
    """The given solver; `FirstOrderSteps` of a torch.optim class or factory, or of the paper's RMSProp.

    Raises:
        TypeError: Neither a `Solver` nor something that makes an optimizer.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise TypeError(f"solver must be a Solver object, got the class; write solver={solver.__name__}()")
    return FirstOrderSteps(solver)  # type: ignore[arg-type]


def output_transfer(output: Any) -> Transfer:
    """The transfer function that matches a network loss.

    Args:
        output: A transfer's name or `Transfer`, or a criterion as a module, a class or a functional.

    Raises:
        TypeError: A criterion without a known transfer.
        ValueError: An unknown name.
    """
    if isinstance(output, str | Transfer):
        return get_transfer(output)
    key = type(output) if isinstance(output, nn.Module) else output
    try:
        name = _CRITERIA.get(key)
    except TypeError:  # not hashable
        name = None
    if name is None and isinstance(key, type):
        name = next((_CRITERIA[base] for base in key.__mro__ if base in _CRITERIA), None)
    if name is None:
        raise TypeError(
            f"output: no transfer function is known for {getattr(key, '__name__', key)!r}; supported criteria: "
            "BCE-with-logits (sigmoid), cross-entropy (softmax), MSE (identity), as module, class or functional; "
            f"or a transfer's name, 'identity' for a loss of the output as it is: {', '.join(transfer_names())}"
        )
    return get_transfer(name)
