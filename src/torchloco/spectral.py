"""Steepest descent in the spectral norm of the change of pre-activations: Muon, seen from a layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.checks import check_count, check_range
from torchloco.exact import averaged_gram, damped_cholesky, wide
from torchloco.grouped import by_group
from torchloco.problem import Size
from torchloco.solvers import Solver, Task, check_finite, joined, move, with_ones

# The quintic of Jordan et al. 2024: five iterations take all but tiny singular values of at most 1 to around 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Spectral(Solver):
    """W̃ - W = -lr · √max(1, d_out/d_in) · orth(M L⁻ᵀ) L⁻¹, with M the momentum of local gradients and LLᵀ = C/N + λI.

    The minimum of ⟨M, W̃ - W⟩ over all changes of W that move the pre-activations by at most so much in the spectral
    norm, ‖(W̃ - W) L‖₂; orth(UΣVᵀ) = UVᵀ. Muon (Jordan et al. 2024) does the same with L = I, so that its steps depend
    on how the inputs are scaled and correlated; these do not. `lr` is the step in units of pre-activations: the root of
    the mean square by which a step moves each of them (for M of full rank and λ → 0). γ, the loss's reduction and the
    batch size drop out. `local_steps` has no part in it.

    C = XᵀX and M are running averages over mini-batches, (d_in + 1)² and d_out · (d_in + 1) numbers per layer. A bias
    is one more column of the weight, with ones in X; a convolution's groups have a C each. For convolutional networks
    and transformers search lr from 0.003 to 0.1.

    Args:
        momentum: Of M, Nesterov's, in [0, 1).
        damping: λ in units of C's mean diagonal entry, > 0.
        average: Decay of the running average of C per row, in [0, 1); 0 uses this mini-batch alone.
        every: C and its factor L are renewed in every so many steps, >= 1; L is kept in between, (d_in + 1)² more
            numbers. The average then is one over the steps that renew it.
        iterations: Of the quintic Newton-Schulz iteration in the place of orth, >= 1.

    Raises:
        TypeError: An argument is not a number.
        ValueError: It is out of range.
    """

    def __init__(
        self,
        momentum: float = 0.95,
        *,
        damping: float = 0.1,
        average: float = 0.95,
        every: int = 1,
        iterations: int = 5,
    ) -> None:
        check_range("momentum", momentum, 0, 1, inclusive=True)
        check_range("damping", damping, 0)
        check_range("average", average, 0, 1, inclusive=True)
        check_count("every", every)
        check_count("iterations", iterations)
        self.momentum = float(momentum)
        self.damping = float(damping)
        self.average = float(average)
        self.every = int(every)
        self.iterations = int(iterations)

    def solve(self, task: Task) -> None:
        """Take the step; see `Solver.solve`."""
        gradient = wide(joined(task.problem.first_gradient(), task))
        check_finite(gradient, task.problem)
        past = task.memory.get("momentum")
        moment = gradient if past is None else torch.add(gradient, past.to(gradient), alpha=self.momentum)
        if self.momentum:
            task.keep["momentum"] = moment
        factor = self._factor(task)
        if factor is None:
            return
        direction = by_group(torch.add(gradient, moment, alpha=self.momentum), len(factor))
        white = torch.linalg.solve_triangular(factor, direction.mT, upper=False).mT
        change = torch.linalg.solve_triangular(factor, orthogonal(white, self.iterations), upper=False, left=False)
        change *= -(max(1.0, change.shape[-2] / change.shape[-1]) ** 0.5)
        move(task, change.flatten(0, 1), task.lrs)

    def _factor(self, task: Task) -> Tensor | None:
        """L, a matrix for each group; None where no input is but zero, which leaves no metric and no gradient."""
        past, age = task.memory.get("factor"), task.memory.get("age", 0)
        if past is not None and age < self.every:
            task.keep["age"] = age + 1
            return wide(past)
        inputs = with_ones(task)
        inputs = inputs.to(torch.promote_types(task.problem.weight.dtype, torch.float32))
        gram = averaged_gram(inputs, task, self.average)
        gram = gram.view(-1, *gram.shape[-2:])
        mean = float(gram.diagonal(dim1=-2, dim2=-1).mean())
        if not inputs.n or not mean:
            return None
        factor = damped_cholesky(gram, self.damping * mean, task.problem.rows.name, "Spectral")
        if self.every > 1:
            task.keep.update(factor=factor, age=1)
        return factor

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of C and its factor per step, of two triangular systems and of the iterations."""
        n, d_in, d_out, groups = size.n, size.d_in, size.d_out, size.groups
        per_group = d_out // groups
        short, long = min(d_in, per_group), max(d_in, per_group)
        iteration = 2 * short**2 * long + short**3
        renewal = (n * d_in**2 + d_in**3 // 6) // self.every
        return groups * (renewal + self.iterations * iteration) + d_out * d_in**2

    def __repr__(self) -> str:
        every = f", every={self.every}" if self.every > 1 else ""
        return f"Spectral(momentum={self.momentum:g}, damping={self.damping:g}, average={self.average:g}{every})"


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """UVᵀ of UΣVᵀ, its ones to within about a third; singular values that are tiny to begin with stay below.

    Args:
        matrix: A batch of matrices, (b, m, n).
        iterations: Of the quintic Newton-Schulz iteration.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x.mT if tall else x
