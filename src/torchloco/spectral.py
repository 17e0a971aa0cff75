"""Steepest descent in the spectral norm of the change of pre-activations: Muon, seen from a layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from torchloco.checks import check_count, check_range
from torchloco.exact import damped_cholesky, wide
from torchloco.grouped import by_group
from torchloco.losses import Loss
from torchloco.moments import averaged_moments
from torchloco.problem import Size
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task, check_finite, joined, move, with_ones

# The quintic of Jordan et al. 2024: five iterations take all but tiny singular values of at most 1 to around 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Spectral(Solver):
    """W̃ - W = -lr · √max(1, d_out/d_in) · orth(M L⁻ᵀ) L⁻¹, with M the momentum of local gradients and LLᵀ = C/N + λI.

    The minimum of ⟨M, W̃ - W⟩ over all changes of W that move the pre-activations by at most so much in the spectral
    norm, ‖(W̃ - W) L‖₂; orth(UΣVᵀ) = UVᵀ. Muon (Jordan et al. 2024) does the same with L = I, so that its steps depend
    on how the inputs are scaled and correlated; these do not. `lr` is the step in units of pre-activations: the root of
    the mean square by which a step moves each of them (for M of full rank and λ → 0; the damping shortens steps where a
    layer's inputs are small beside the ones of its bias, or a group's beside the other groups'). γ, the loss's
    reduction and the batch size drop out. `local_steps` has no part in it. Layers and groups without any gradient rest.

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

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """No regularizer is taken: the length of the step is given, whatever the objective is."""
        if regularizer is not None:
            raise ValueError(
                f"Spectral takes steps of a given length and no regularizer, got {regularizer!r}; use FirstOrderSteps "
                "with it"
            )

    def solve(self, task: Task) -> None:
        """Take the step; see `Solver.solve`."""
        # The positive factor of the first gradient, γ for one, would drop out.
        gradient = wide(joined(task.problem.first[0], task))
        check_finite(gradient, task.problem)
        past = task.memory.get("momentum")
        moment = gradient if past is None else torch.add(gradient, _fitted(past, gradient), alpha=self.momentum)
        if self.momentum:
            task.keep["momentum"] = moment
        factor = self._factor(task, gradient)
        if factor is None:
            return
        # Groups without a gradient rest: of their momentum only the direction would count, until it is rounding.
        gradients = by_group(gradient, len(factor))
        moving = gradients.flatten(1).any(1)[:, None, None]
        direction = torch.add(gradients, by_group(moment, len(factor)), alpha=self.momentum) * moving
        white = torch.linalg.solve_triangular(factor, direction.mT, upper=False).mT
        change = torch.linalg.solve_triangular(factor, orthogonal(white, self.iterations), upper=False, left=False)
        change *= -(max(1.0, change.shape[-2] / change.shape[-1]) ** 0.5)
        move(task, change.flatten(0, 1), task.lrs)

    def _factor(self, task: Task, gradient: Tensor) -> Tensor | None:
        """L, a matrix for each group; None where nothing is to be done: no rows, no gradient, or inputs all zero."""
        inputs = with_ones(task)
        past, age = task.memory.get("factor"), task.memory.get("age", 0)
        if not inputs.all_rows or not bool(gradient.any()):
            self._keep(task)
            return None
        if past is not None and past.shape[-1] == inputs.d_in and age < self.every:
            self._keep(task)
            task.keep["age"] = age + 1
            return wide(past).to(gradient)
        gram = averaged_moments(inputs.to(gradient.dtype), task, self.average)
        mean = float(gram.diagonal(dim1=-2, dim2=-1).mean())
        if not mean:
            return None
        factor = damped_cholesky(gram, self.damping * mean, task.problem.rows.name, "Spectral")
        if self.every > 1:
            task.keep.update(factor=factor, age=1)
        return factor

    @staticmethod
    def _keep(task: Task) -> None:
        """Keep the metric as it is."""
        task.keep.update({key: task.memory[key] for key in ("gram", "factor", "age") if key in task.memory})

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
        iterations = f", iterations={self.iterations}" if self.iterations != 5 else ""
        options = f"momentum={self.momentum:g}, damping={self.damping:g}, average={self.average:g}{every}{iterations}"
        return f"Spectral({options})"


def _fitted(past: Tensor, like: Tensor) -> Tensor:
    """The past momentum with the bias's column dropped, or of zeros, where the bias was frozen or freed since."""
    return torch.nn.functional.pad(past.to(like), (0, like.shape[1] - past.shape[1]))


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """UVᵀ of UΣVᵀ, its ones to within about a third; singular values that are tiny to begin with stay below.

    Args:
        matrix: A batch of matrices, (b, m, n).
        iterations: Of the quintic Newton-Schulz iteration.
    """
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    for order in (torch.inf, 2):  # the largest entry first, so that squares neither overflow nor vanish
        size = torch.linalg.vector_norm(x, order, (-2, -1), keepdim=True)
        x = x / torch.where(size > 0, size, 1)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x.mT if tall else x
