"""Newton's method on the local problem, which the matching loss makes convex."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.anderson import check_convex
from torchloco.checks import check_count, check_range
from torchloco.conjugate import conjugate_gradient
from torchloco.exact import curvature, damped_cholesky
from torchloco.losses import Loss
from torchloco.problem import LocalProblem, Size
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task, joined, move, split, with_ones

_HALVINGS = 6
_CHUNK = 1 << 24  # entries of the Hessians that are held at once


class Newton(Solver):
    """Newton's method, which for the matching loss is iteratively reweighted least squares: quadratic convergence.

    Each unit k has a Hessian of its own, H_k = Xᵀ diag(f′(a_k)) X. They are formed and factorised where that takes at
    most `direct` multiply-adds per iteration, N·d_in²·d_out + d_out·d_in³/6: layers of up to some hundred units and
    inputs on a batch of a thousand. Larger layers, and transfers that mix units, as softmax, solve H Δ = -∇J by
    conjugate gradients, an iteration of which costs two products over the rows. A step is halved, unit by unit, as long
    as it would not let the gradient fall. `lr` and `local_steps` have no part in it: `activation_lr`, times what a
    scheduler has made of lr, is the step size.

    Args:
        iterations: >= 1.
        damping: Added to the Hessians in units of C's mean diagonal entry, > 0. The minimum stays where it is.
        direct: The largest number of multiply-adds per iteration at which Hessians are formed, >= 0.
        conjugate_gradients: At most so many inner iterations for the other layers, >= 1.

    Raises:
        TypeError, ValueError: An argument of another type or out of range.
    """

    def __init__(
        self,
        iterations: int = 3,
        *,
        damping: float = 1e-5,
        direct: float = 2e9,
        conjugate_gradients: int = 10,
    ) -> None:
        check_count("iterations", iterations)
        check_count("conjugate_gradients", conjugate_gradients)
        check_range("damping", damping, 0)
        check_range("direct", direct, 0, inclusive=True)
        self.iterations = iterations
        self.damping = float(damping)
        self.direct = float(direct)
        self.conjugate_gradients = conjugate_gradients

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """The problem must be convex with a known second derivative."""
        check_convex(self, loss, regularizer)

    def solve(self, task: Task) -> None:
        """Iterate from the old weights; see `Solver.solve`."""
        problem = task.problem
        transfer = problem.rows.transfer
        if transfer.elementwise and transfer.derivative is None and not problem.quadratic:
            raise ValueError(
                f"layer {problem.rows.name!r}: Newton needs the derivative of transfer {transfer.name!r}, which is not "
                "known; give Transfer(derivative=...), or use FirstOrderSteps or Anderson"
            )
        x = with_ones(task)
        old = joined(problem.old)
        weights, gradient = old.clone(), joined(problem.first_gradient()).clone()
        damping = self.damping * float(x.square().sum()) / x.shape[1] + torch.finfo(x.dtype).tiny
        per_unit = transfer.elementwise or problem.quadratic
        dims = (1,) if per_unit else (0, 1)
        for _ in range(self.iterations):
            norm = gradient.norm(dim=dims, keepdim=True)
            if not norm.any():
                break
            change = self._direction(x, weights, gradient, damping, task)
            active = norm > 0
            for _ in range(_HALVINGS):
                trial = torch.where(active, weights + change, weights)
                trial_gradient = joined(problem.gradient(split(trial, task)))
                better = active & (trial_gradient.norm(dim=dims, keepdim=True) < norm)
                weights = torch.where(better, trial, weights)
                gradient = torch.where(better, trial_gradient, gradient)
                active = active & ~better
                if not active.any():
                    break
                change = change / 2
        move(task, weights - old)

    def _direction(self, x: Tensor, weights: Tensor, gradient: Tensor, damping: float, task: Task) -> Tensor:
        """-H⁻¹∇J, for all units."""
        problem = task.problem
        transfer = problem.rows.transfer
        ridge = damping + curvature(problem)
        a = problem.pre_activations(split(weights, task))
        if problem.quadratic or transfer.elementwise:
            slopes = torch.ones_like(a) if problem.quadratic or transfer.derivative is None else transfer.derivative(a)
            if self._is_direct(problem.size):
                return -_solve_each(x, slopes, gradient, ridge, problem)

            def image(v: Tensor) -> Tensor:
                return ((x @ v.t()).mul_(slopes).t() @ x).add_(v, alpha=ridge)

            return conjugate_gradient(image, -gradient, self.conjugate_gradients, 1e-8)
        a = a.clone()  # the Jacobian of such a transfer is symmetric

        def mixed_image(v: Tensor) -> Tensor:
            return (transfer.vjp(a, x @ v.t()).t() @ x).add_(v, alpha=ridge)

        return conjugate_gradient(mixed_image, -gradient, self.conjugate_gradients, 1e-8, per_unit=False)

    def _is_direct(self, size: Size) -> bool:
        return size.d_out * (size.n * size.d_in**2 + size.d_in**3 // 6) <= self.direct

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of all iterations without halvings; softmax layers count as if their units were apart."""
        if self._is_direct(size):
            hessians = size.d_out * (size.n * size.d_in**2 + size.d_in**3 // 6)
            return self.iterations * (3 * size.product + hessians)
        return self.iterations * (3 + 2 * self.conjugate_gradients) * size.product

    def __repr__(self) -> str:
        return f"Newton(iterations={self.iterations}, damping={self.damping:g})"


def _solve_each(x: Tensor, slopes: Tensor, gradient: Tensor, ridge: float, problem: LocalProblem) -> Tensor:
    """(Xᵀ diag(slopes of unit k) X + ridge·I)⁻¹ gradient_k for every unit k, some units at a time."""
    columns = x.shape[1]
    chunk = max(1, _CHUNK // max(1, columns * max(columns, len(x))))
    solved = torch.empty_like(gradient)
    for start in range(0, len(gradient), chunk):
        units = slice(start, start + chunk)
        weighted = x.t() * slopes.t()[units, None, :]  # (units, columns, N)
        factor = damped_cholesky(weighted @ x, ridge, problem.rows.name, "Newton")
        solved[units] = torch.cholesky_solve(gradient[units, :, None], factor).squeeze(2)
    return solved
