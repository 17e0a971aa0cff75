"""Solvers of the squared loss that use its quadratic form: in closed form, and by conjugate gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.checks import check_count, check_range
from torchloco.losses import Loss, SquaredLoss
from torchloco.problem import LocalProblem
from torchloco.regularizers import Regularizer, SquaredDistance
from torchloco.solvers import Solver


class _Quadratic(Solver):
    """What the solvers of the quadratic problem share: the minimum of ½‖XΔᵀ + δ‖² + (λ/2)‖Δ‖² over Δ = W̃ - W."""

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """Only the squared loss on pre-activations, alone or with a squared distance, is quadratic."""
        if type(loss) is not SquaredLoss:
            raise ValueError(
                f"{type(self).__name__} solves quadratic problems, and {loss!r} is none; use loss='squared' with it, "
                "or FirstOrderSteps with this loss"
            )
        if regularizer is not None and not isinstance(regularizer, SquaredDistance):
            raise ValueError(
                f"{type(self).__name__} supports no regularizer or SquaredDistance, got {regularizer!r}; use "
                "FirstOrderSteps with it"
            )

    def _damping(self, problem: LocalProblem) -> float:
        return 0.0 if problem.regularizer is None else problem.regularizer.strength  # type: ignore[attr-defined]

    # A bias that is learnt is one more column of the weight, with a column of ones in X.

    def _rows(self, problem: LocalProblem, params: list[Parameter]) -> Tensor:
        x = problem.rows.x
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if len(params) > 1 else x

    def _gradient(self, problem: LocalProblem) -> Tensor:
        weight, *bias = problem.first_gradient()
        return torch.cat([weight, bias[0][:, None]], 1) if bias else weight

    def _move(self, params: list[Parameter], change: Tensor) -> None:
        weight, *bias = params
        weight.add_(change[:, : weight.shape[1]])
        if bias:
            bias[0].add_(change[:, -1])


class Exact(_Quadratic):
    """The minimum itself: W̃ = W - γ · ∂L/∂W · (C + λI)⁻¹ with C = XᵀX, by Cholesky factors (LocoProp-S solved exactly).

    This is K-FAC with its input factor alone (FOOF, Benzing 2022). A bias is one more column of the weight, with ones
    in X. Where a batch has fewer rows than columns, the N×N form (XXᵀ + λI) is factorised instead. `lr` and
    `local_steps` have no part in it: `activation_lr` is the step size.

    Args:
        damping: λ, > 0; `SquaredDistance` regularizers add to it. A sum over rows as C is: it grows with the batch.
        relative: Whether λ is in units of C's mean diagonal entry, and so independent of the batch size.

    Raises:
        TypeError: `damping` is not a number.
        ValueError: `damping` is not above 0.
    """

    def __init__(self, damping: float = 1e-3, *, relative: bool = True) -> None:
        check_range("damping", damping, 0)
        self.damping = float(damping)
        self.relative = bool(relative)

    def solve(
        self,
        problem: LocalProblem,
        params: list[Parameter],
        inner: Optimizer | None,
        lrs: Sequence[float],
        steps: int,
    ) -> None:
        """Jump to the minimum; see `Solver.solve`."""
        x = self._rows(problem, params)
        n, columns = x.shape
        scale = float(x.square().sum()) / columns if self.relative else 1.0
        damping = max(self.damping * scale, torch.finfo(x.dtype).tiny) + self._damping(problem)
        if n < columns:
            factor = self._factor(x @ x.t(), damping, problem.rows.name)
            change = torch.cholesky_solve(problem.first_residual(), factor).t() @ x
        else:
            gradient = self._gradient(problem)
            factor = self._factor(x.t() @ x, damping, problem.rows.name)
            change = torch.cholesky_solve(gradient.t(), factor).t()
        self._move(params, -change)

    def _factor(self, gram: Tensor, damping: float, name: str) -> Tensor:
        """The Cholesky factor of gram + damping·I, with more damping where rounding made that indefinite."""
        for attempt in range(12):
            damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * damping
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                if attempt:
                    warnings.warn(
                        f"layer {name!r}: C + λI was not positive definite in {gram.dtype}; λ was raised to "
                        f"{damping:.3g}. Give Exact a larger damping",
                        stacklevel=2,
                    )
                return factor
            damping = max(10 * damping, torch.finfo(gram.dtype).eps * float(gram.diagonal().mean()))
        raise RuntimeError(f"layer {name!r}: C + λI could not be factorised even with λ = {damping:.3g}")

    def __repr__(self) -> str:
        return f"Exact(damping={self.damping:g}{', relative' if self.relative else ''})"


class ConjugateGradient(_Quadratic):
    """Conjugate gradients on (C + λI)Δᵀ = -(γ · ∂L/∂W)ᵀ, all units at once; no factorisation, C is never formed.

    An iteration costs two products over the rows, as a first-order step does. Each unit has its own step sizes.

    Args:
        iterations: At most so many, >= 1; None takes the layer's `local_steps`.
        tolerance: A unit stops when its residual has fallen by this factor, in [0, 1).
    """

    def __init__(self, iterations: int | None = None, *, tolerance: float = 1e-6) -> None:
        if iterations is not None:
            check_count("iterations", iterations)
        check_range("tolerance", tolerance, 0, 1, inclusive=True)
        self.iterations = iterations
        self.tolerance = float(tolerance)

    def solve(
        self,
        problem: LocalProblem,
        params: list[Parameter],
        inner: Optimizer | None,
        lrs: Sequence[float],
        steps: int,
    ) -> None:
        """Iterate from the old weights; see `Solver.solve`."""
        x = self._rows(problem, params)
        rest = -self._gradient(problem)
        damping = self._damping(problem)
        change = torch.zeros_like(rest)
        direction = rest.clone()
        energy = rest.square().sum(1, keepdim=True)
        enough = energy * self.tolerance**2
        for _ in range(self.iterations or steps):
            image = (direction @ x.t()) @ x
            if damping:
                image.add_(direction, alpha=damping)
            curvature = (direction * image).sum(1, keepdim=True)
            active = (energy > enough) & (curvature > 0)
            if not active.any():
                break
            size = torch.where(active, energy / curvature, 0.0)
            change.addcmul_(size, direction)
            rest.addcmul_(size, image, value=-1)
            fresh = torch.where(active, rest.square().sum(1, keepdim=True), energy)
            direction.mul_(torch.where(active, fresh / energy, 0.0)).add_(rest)
            energy = fresh
        self._move(params, change)

    def __repr__(self) -> str:
        return f"ConjugateGradient(iterations={self.iterations or 'local_steps'}, tolerance={self.tolerance:g})"
