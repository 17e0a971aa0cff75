"""How a local problem is solved: what every solver is given, and the step that needs no rows at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.inputs import Inputs
from torchloco.losses import Loss, MatchingLoss, SquaredLoss
from torchloco.problem import LocalProblem, Size
from torchloco.regularizers import Regularizer


@dataclass
class Task:
    """One layer's local problem for one mini-batch, with all that a solver may need to solve it.

    Args:
        problem: The local problem; its `weight` and `bias` are copies of the old values.
        params: Weight, and bias if it is learnt: where the old values are and the new ones go.
        lrs: The learning rate of each of them.
        steps: T, the number of local steps.
        inner: What `Solver.attach` returned for this layer.
        scales: What each lr is relative to its highest so far. Solvers that have no
            use for lr itself multiply their displacement by it.
        safe: Whether the solver should stop when the local objective no longer falls. That it does not rise is seen to
            elsewhere.
        memory: What the solver has kept of this layer from earlier mini-batches, by name. Not to be written to.
        keep: What it wants to find there next time. Taken over, and saved with the optimizer, when the step succeeds.
            Loading moves tensors to the weight's device and changes nothing else.
    """

    problem: LocalProblem
    params: list[Parameter]
    lrs: Sequence[float]
    steps: int
    inner: Optimizer | None = None
    scales: Sequence[float] = (1.0, 1.0)
    safe: bool = False
    memory: Mapping[str, Any] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[Tensor]:
        """The current values of `params`, without their history."""
        return [p.data for p in self.params]

    def forget(self) -> None:
        """Let the solver's state of this layer start anew, after a solve that has spoilt it."""
        self.keep.clear()
        if self.inner is not None:
            for p in self.params:
                self.inner.state[p].clear()


class Solver(ABC):
    """Solves local problems. Yours needs `solve`."""

    #: Whether lr is a step size of its own; otherwise a displacement is scaled by what a scheduler has made of it.
    uses_lr: bool = True

    @property
    def name(self) -> str:
        """What a saved state belongs to."""
        return type(self).__name__

    def attach(self, params: list[Parameter], lr: float) -> Optimizer | None:
        """Called once per layer: the optimizer whose state goes with this layer's parameters, if there is one."""
        return None

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:  # noqa: B027 - most solvers take every problem
        """Refuse local problems that this solver cannot solve.

        Raises:
            ValueError: Names what is not supported and what to use instead.
        """

    @abstractmethod
    def solve(self, task: Task) -> None:
        """Move `task.params` in place towards the problem's minimum; their `.grad` stays as it is."""

    def multiply_adds(self, size: Size, steps: int) -> int | None:
        """What solving a problem of this size costs, to leading order; None where that is not known.

        Args:
            size: The problem's size.
            steps: T, the layer's number of local steps.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ProximalStep(Solver):
    """W̃ = argmin ⟨∇, W̃⟩ + R(W̃, W) with ∇ the local loss's gradient at W: one step in the regularizer's geometry.

    With `SquaredDistance` it is a step of gradient descent, with `RelativeEntropy` an exponentiated-gradient step. `lr`
    and `local_steps` have no part in it: γ / λ, times what a scheduler has made of lr, is the step size. It costs no
    matrix product.
    """

    uses_lr = False

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """The regularizer must have a closed proximal step."""
        if type(getattr(regularizer, "proximal", None)) is not MethodType or (
            isinstance(regularizer, Regularizer) and type(regularizer).proximal is Regularizer.proximal
        ):
            hint = "give regularizer=SquaredDistance(1.0)" if regularizer is None else "use FirstOrderSteps with it"
            raise ValueError(
                f"ProximalStep needs a regularizer with a proximal step (SquaredDistance, RelativeEntropy), got "
                f"{regularizer!r}; {hint}"
            )

    def solve(self, task: Task) -> None:
        """Take the step; see `Solver.solve`."""
        regularizer = task.problem.regularizer
        assert regularizer is not None
        gradients = task.problem.first_gradient(regularized=False)
        for p, gradient, scale in zip(task.params, gradients, task.scales, strict=False):
            p.copy_(regularizer.proximal(gradient * scale, p.data))

    def multiply_adds(self, size: Size, steps: int) -> int:
        """None but the elementwise ones."""
        return size.d_in * size.d_out


def check_curvature(solver: Solver, regularizer: Regularizer | None) -> None:
    """Raise unless the regularizer's second derivative is known, and a multiple of the identity.

    Raises:
        ValueError: It is not.
    """
    if regularizer is not None and getattr(regularizer, "curvature", None) is None:
        raise ValueError(
            f"{type(solver).__name__} takes no other regularizer than SquaredDistance, WeightDecay and their sums, got "
            f"{regularizer!r}; use FirstOrderSteps with it"
        )


def check_convex(solver: Solver, loss: Loss, regularizer: Regularizer | None) -> None:
    """Raise unless the local problem is convex with known curvature.

    Raises:
        ValueError: It is not.
    """
    if type(loss) not in (SquaredLoss, MatchingLoss):
        raise ValueError(
            f"{type(solver).__name__} solves convex problems, those of the matching and the squared loss, and {loss!r} "
            "is not known to be convex; use FirstOrderSteps with it"
        )
    check_curvature(solver, regularizer)


def curvature(problem: LocalProblem) -> float:
    """The regularizer's λ."""
    if problem.regularizer is None:
        return 0.0
    known = problem.regularizer.curvature
    assert known is not None  # see the solvers' check()
    return known


def check_finite(gradient: Tensor, problem: LocalProblem) -> None:
    """Raise unless the first gradient is finite: solvers that compare would take it for a minimum.

    Raises:
        RuntimeError: It is not.
    """
    if not bool(gradient.isfinite().all()):
        raise RuntimeError(
            f"layer {problem.rows.name!r}: the gradient of its local problem is not finite; look at its target and "
            "regularizer, or lower activation_lr"
        )


# A bias that is learnt is one more column of the weight, with a column of ones in X.


def with_ones(task: Task) -> Inputs:
    """X, with a column of ones if the bias is learnt: d_in or d_in + 1 columns."""
    inputs = task.problem.inputs
    return inputs.with_ones() if len(task.params) > 1 else inputs


def joined(tensors: Sequence[Tensor], task: Task) -> Tensor:
    """Weight and bias (or their gradients) as one new matrix, (d_out, d_in) or (d_out, d_in + 1)."""
    weight, *bias = tensors
    matrix = task.problem.matrix(weight)
    return torch.cat([matrix, bias[0][:, None]], 1) if bias else matrix.clone()


def split(matrix: Tensor, task: Task) -> list[Tensor]:
    """The opposite of `joined`: weight and bias in the shapes of the parameters."""
    problem = task.problem
    if len(task.params) == 1:
        return [problem.shaped(matrix)]
    # A convolution's shape needs the weight's columns in a row; a matrix is taken out of the wider one as it is.
    weight = matrix[:, :-1] if problem.weight.dim() == 2 else matrix[:, :-1].contiguous()
    return [problem.shaped(weight), matrix[:, -1]]


def move(task: Task, change: Tensor, factors: Sequence[float] | None = None) -> None:
    """Add a change of weight and bias, times a factor each: by default what a scheduler has made of their rates."""
    for p, delta, factor in zip(task.params, split(change, task), factors or task.scales, strict=False):
        p.add_(delta, alpha=factor)
