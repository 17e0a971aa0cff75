"""Anderson acceleration of gradient steps on the local problem."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.checks import check_count, check_range
from torchloco.losses import Loss
from torchloco.problem import LocalProblem, Size
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task, check_convex, check_finite, curvature, joined, move, split, with_ones

_POWER_ITERATIONS = 8
_LONGEST = 100
"""A step is at most so many times as long as the gradient step it replaces: with a target that leaves the range of f
the minimum can be at infinity."""


class Anderson(Solver):
    """Anderson acceleration of the fixed point W̃ = W̃ - h·∇J(W̃): each iterate combines the last few gradients best.

    Each unit has mixing coefficients of its own, from a least-squares problem of `memory` unknowns (all units share
    them for transfers that mix units, as softmax). For the squared loss an iteration is one of GMRES. It costs two
    products over the rows, as a first-order step does; the step h is 1 / (max f′ · largest eigenvalue of C). `lr` has
    no part in it: `activation_lr`, times what a scheduler has made of lr, is the step size. Where units leave
    saturation or f has kinks the objective may rise; `LocoProp(safe=True)` does not let it. Source: Walker and Ni,
    "Anderson acceleration for fixed-point iterations", 2011.

    Args:
        memory: How many earlier differences are combined, >= 1. Held during a layer's solve only: 2 · memory times the
            layer's weights.
        iterations: >= 1; None takes the layer's `local_steps`.
        tolerance: A unit stops when its gradient has fallen by this factor, in [0, 1).

    Raises:
        TypeError: `memory` or `iterations` is no whole number.
        ValueError: One of them is out of range.
    """

    uses_lr = False

    def __init__(self, memory: int = 5, iterations: int | None = None, *, tolerance: float = 1e-6) -> None:
        check_count("memory", memory)
        if iterations is not None:
            check_count("iterations", iterations)
        check_range("tolerance", tolerance, 0, 1, inclusive=True)
        self.memory = memory
        self.iterations = iterations
        self.tolerance = float(tolerance)

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """The loss must be convex, and the regularizer's curvature known, so that the fixed point attracts."""
        check_convex(self, loss, regularizer)

    def solve(self, task: Task) -> None:
        """Iterate from the old weights; see `Solver.solve`."""
        problem, iterations = task.problem, self.iterations or task.steps
        gram = problem.size.prefers_gram(iterations - 1)
        further = problem.gram_gradient if gram else problem.gradient
        h = 1 / (_slope(problem) * _largest_eigenvalue(task) + curvature(problem) + torch.finfo(torch.float32).tiny)
        old = joined(problem.old, task)
        mixing = _Mixing(old, self.memory, problem.rows.transfer.elementwise or problem.quadratic)
        iterate = old.clone()
        enough: Tensor | None = None
        for k in range(iterations):
            gradients = problem.first_gradient() if k == 0 else further(split(iterate, task))
            residual = joined(gradients, task).mul(-h)
            if k == 0:
                check_finite(residual, problem)
            size = residual.norm(dim=1, keepdim=True)
            if enough is None:
                enough = size * self.tolerance
            if not (size > enough).any():
                break
            iterate += torch.where(size > enough, mixing.step(iterate, residual), 0.0)
        move(task, iterate - old)

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of the gradients after the first, and of the mixing."""
        count = self.iterations or steps
        mixing = (self.memory**2 + 2 * self.memory) * size.d_in * size.d_out * count
        return size.gradients(count - 1) + mixing

    def __repr__(self) -> str:
        return f"Anderson(memory={self.memory}, iterations={self.iterations or 'local_steps'})"


class _Mixing:
    """The last differences of iterates and residuals, and the step they suggest.

    Args:
        like: A matrix of the iterates' shape, (d_out, columns).
        memory: How many are kept.
        per_unit: Whether each unit mixes on its own.
    """

    def __init__(self, like: Tensor, memory: int, per_unit: bool) -> None:
        self._shape = like.shape if per_unit else (1, like.numel())
        units, columns = self._shape
        self._residuals = like.new_empty(units, memory, columns)
        self._images = like.new_empty(units, memory, columns)  # differences of iterate + residual
        self._count = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def step(self, iterate: Tensor, residual: Tensor) -> Tensor:
        """The change from this iterate to the next."""
        shape = residual.shape
        x, r = iterate.reshape(self._shape), residual.reshape(self._shape)
        if self._last is not None:
            slot = self._count % self._residuals.shape[1]
            torch.sub(r, self._last[1], out=self._residuals[:, slot])
            torch.add(self._residuals[:, slot], x - self._last[0], out=self._images[:, slot])
            self._count += 1
        self._last = (x.clone(), r.clone())
        kept = min(self._count, self._residuals.shape[1])
        if not kept:
            return residual
        differences, images = self._residuals[:, :kept], self._images[:, :kept]
        normal = (differences @ differences.mT).double()
        right = (differences @ r.unsqueeze(2)).double()
        diagonal = normal.diagonal(dim1=1, dim2=2)
        # Differences of very different lengths make the system look worse than it is; so does a unit that is done.
        inverse_length = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        normal = normal * inverse_length[:, :, None] * inverse_length[:, None, :]
        normal.diagonal(dim1=1, dim2=2).add_(max(1e-12, 4 * torch.finfo(residual.dtype).eps))
        solved, _ = torch.linalg.solve_ex(normal, right * inverse_length[:, :, None])
        coefficients = torch.nan_to_num(solved * inverse_length[:, :, None])
        step: Tensor = r - (coefficients.to(r.dtype).mT @ images).squeeze(1)
        uphill = (step * r).sum(1) <= 0
        if uphill.any():  # such a unit starts anew, from here
            step = torch.where(uphill[:, None], r, step)
            self._residuals[uphill] = 0
            self._images[uphill] = 0
        limit = _LONGEST * r.norm(dim=1, keepdim=True) / step.norm(dim=1, keepdim=True).clamp(min=1e-30)
        step = step * limit.clamp(max=1)
        return step.reshape(shape)


def _slope(problem: LocalProblem) -> float:
    """The largest f′ at the rows' pre-activations and near zero, where saturated units may come to; 1 for softmax."""
    transfer, a = problem.rows.transfer, problem.rows.a
    if problem.quadratic or not transfer.elementwise:
        return 1.0
    places = torch.cat([a.flatten(), torch.linspace(-3, 3, 13, dtype=a.dtype, device=a.device)])
    return float(problem.inputs.largest(transfer.vjp(places, torch.ones_like(places)).max())) or 1.0


def _largest_eigenvalue(task: Task) -> float:
    """That of C (with the column of ones), from below, by power iteration."""
    x, like = with_ones(task), task.problem.weight
    u = torch.cos(1.7 * torch.arange(x.n, dtype=torch.float64, device=like.device) ** 2 + 0.3).to(like.dtype)
    v = x.sum(u[:, None].expand(-1, x.groups).contiguous())  # no symmetry of the rows makes this vanish
    values = v.new_zeros(x.groups, 1)
    for _ in range(_POWER_ITERATIONS):  # in every group of inputs
        v = x.sum(x.apply(v))
        values = v.norm(dim=1, keepdim=True)
        v = v / values.clamp(min=torch.finfo(v.dtype).tiny)
    return float(values.max()) or x.squares()
