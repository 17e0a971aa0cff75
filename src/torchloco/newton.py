"""Newton's method on the local problem, which the matching loss makes convex."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.checks import check_count, check_range
from torchloco.conjugate import conjugate_gradient
from torchloco.exact import damped_cholesky
from torchloco.inputs import Inputs
from torchloco.losses import Loss, SquaredLoss
from torchloco.problem import LocalProblem, Size
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task, check_convex, check_finite, curvature, joined, move, split, with_ones

_TRIES = 8
_CUT = 0.25
_OVERSHOOT = 0.1  # share of the first slope that the last one may have
_CHUNK = 1 << 24  # entries of the Hessians that are held at once


class Newton(Solver):
    """Newton's method, which for the matching loss is iteratively reweighted least squares: quadratic convergence.

    Each unit k has a Hessian of its own, H_k = Xᵀ diag(f′(a_k)) X. They are formed and factorised where that takes at
    most `direct` multiply-adds per iteration, N·d_in²·d_out + d_out·d_in³/6: layers of up to some hundred units and
    inputs on a batch of a thousand. Larger layers, and transfers that mix units, as softmax, solve H Δ = -∇J by
    conjugate gradients, an iteration of which costs two products over the rows. A step that goes too far is cut,
    unit by unit. `lr` and `local_steps` have no part in it: `activation_lr`, times what a scheduler has made of lr, is
    the step size.

    Args:
        iterations: >= 1.
        damping: Added to the Hessians in units of C's mean diagonal entry, > 0. The minimum stays where it is.
        direct: The largest number of multiply-adds per iteration at which Hessians are formed, >= 0.
        conjugate_gradients: At most so many inner iterations for the other layers, >= 1.

    Raises:
        TypeError, ValueError: An argument of another type or out of range.
    """

    uses_lr = False

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
        if problem.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"layer {problem.rows.name!r}: Newton supports float32 and float64, got "
                f"{problem.weight.dtype} weights; use FirstOrderSteps"
            )
        x = with_ones(task)
        old = joined(problem.old, task)
        weights, gradient = old.clone(), joined(problem.first_gradient(), task)
        check_finite(gradient, problem)
        damping = self.damping * x.squares() / (x.groups * x.d_in) + torch.finfo(old.dtype).tiny
        per_unit = transfer.elementwise or problem.quadratic
        dims = (1,) if per_unit else (0, 1)
        for _ in range(self.iterations):
            norm = gradient.norm(dim=dims, keepdim=True)
            if not norm.any():
                break
            change = self._direction(x, weights, gradient, damping, task)
            active, slope = norm > 0, (gradient * change).sum(dims, keepdim=True)
            value = _values(problem, weights, old, task)
            for _ in range(_TRIES):
                trial = torch.where(active, weights + change, weights)
                reached = _values(problem, trial, old, task)
                fallen = torch.zeros_like(active) if value is None or reached is None else reached <= value
                trial_gradient = joined(problem.gradient(split(trial, task)), task)
                # A convex function has fallen where its slope is still downhill. Close to the minimum, where rounding
                # hides by how much the value falls, the gradient's norm tells.
                end_slope = (trial_gradient * change).sum(dims, keepdim=True)
                close = (end_slope <= -_OVERSHOOT * slope) & (trial_gradient.norm(dim=dims, keepdim=True) < norm / 2)
                better = active & (fallen | (end_slope <= 0) | close)
                weights = torch.where(better, trial, weights)
                gradient = torch.where(better, trial_gradient, gradient)
                active = active & ~better
                if not active.any():
                    break
                change, slope = change * _CUT, slope * _CUT
        move(task, weights - old)

    def _direction(self, x: Inputs, weights: Tensor, gradient: Tensor, damping: float, task: Task) -> Tensor:
        """-H⁻¹∇J, for all units."""
        problem = task.problem
        transfer = problem.rows.transfer
        ridge = damping + curvature(problem)
        a = problem.pre_activations(split(weights, task))
        if problem.quadratic or transfer.elementwise:
            ones = torch.ones_like(a)
            slopes = ones if problem.quadratic else transfer.vjp(a, ones)
            if self._is_direct(problem.size):
                return -_solve_each(x, slopes, gradient, ridge, problem)

            def image(v: Tensor) -> Tensor:
                return x.sum(x.apply(v).mul_(slopes)).add_(v, alpha=ridge)

            return conjugate_gradient(image, -gradient, self.conjugate_gradients, 1e-8)
        a = a.clone()  # the Jacobian of such a transfer is symmetric

        def mixed_image(v: Tensor) -> Tensor:
            return x.sum(transfer.vjp(a, x.apply(v))).add_(v, alpha=ridge)

        return conjugate_gradient(mixed_image, -gradient, self.conjugate_gradients, 1e-8, per_unit=False)

    def _is_direct(self, size: Size) -> bool:
        return size.d_out * (size.n * size.d_in**2 + size.d_in**3 // 6) <= self.direct

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of all iterations if no step is cut; softmax layers count as if their units were apart."""
        if self._is_direct(size):
            hessians = size.d_out * (size.n * size.d_in**2 + size.d_in**3 // 6)
            return self.iterations * (5 * size.product + hessians)
        return self.iterations * (5 + 2 * self.conjugate_gradients) * size.product

    def __repr__(self) -> str:
        return f"Newton(iterations={self.iterations}, damping={self.damping:g})"


def _values(problem: LocalProblem, weights: Tensor, old: Tensor, task: Task) -> Tensor | None:
    """The objective up to a constant, by unit, (d_out, 1), or in all where units are mixed; None where F is unknown."""
    transfer, t = problem.rows.transfer, problem.t
    a = problem.pre_activations(split(weights, task))
    if problem.quadratic or type(problem.loss) is SquaredLoss:
        values = (a - t).square().sum(0)[:, None] / 2
    elif transfer.integral is None:
        return None
    elif transfer.elementwise:
        values = (transfer.integral(a) - t * a).sum(0)[:, None]
    else:
        values = (transfer.integral(a).sum() - (t * a).sum()).reshape(1, 1)
    values = problem.inputs.total(values)
    if problem.regularizer is not None:
        change = weights - old
        pull = joined([problem.regularizer.gradient(w, w) for w in problem.old], task)
        penalties = (change * (pull + change * (curvature(problem) / 2))).sum(1, keepdim=True)
        values = values + (penalties if len(values) == len(penalties) else penalties.sum())
    return values


def _solve_each(x: Inputs, slopes: Tensor, gradient: Tensor, ridge: float, problem: LocalProblem) -> Tensor:
    """(Xᵀ diag(slopes of unit k) X + ridge·I)⁻¹ gradient_k for every unit k, some units at a time."""
    blocks = list(x.blocks())  # few: Hessians are formed for small problems only
    rows = x.all_rows if x.shared else max(len(block[0]) for _, block in blocks)
    per_group = len(gradient) // x.groups
    chunk = max(1, _CHUNK // max(1, x.d_in * max(x.d_in, rows)))
    solved = torch.empty_like(gradient)
    for group in range(x.groups):
        end = (group + 1) * per_group
        for start in range(group * per_group, end, chunk):
            units = slice(start, min(start + chunk, end))
            hessians = gradient.new_zeros(units.stop - start, x.d_in, x.d_in)
            for places, block in blocks:
                weighted = block[group].t() * slopes[places].t()[units, None, :]  # (units, columns, rows)
                hessians += weighted @ block[group]
            factor = damped_cholesky(x.total(hessians), ridge, problem.rows.name, "Newton")
            solved[units] = torch.cholesky_solve(gradient[units, :, None], factor).squeeze(2)
    return solved
