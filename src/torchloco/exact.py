"""Solvers of the squared loss that use its quadratic form: in closed form, and by conjugate gradients."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torchloco.checks import check_count, check_range
from torchloco.conjugate import conjugate_gradient
from torchloco.grouped import by_group
from torchloco.inputs import Inputs
from torchloco.losses import Loss, SquaredLoss
from torchloco.moments import averaged_moments, rows_of_groups
from torchloco.problem import LocalProblem, Size
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task, check_curvature, check_finite, curvature, joined, move, with_ones


class _Quadratic(Solver):
    """What the solvers of the quadratic problem share: the minimum of ½‖XΔᵀ + δ‖² + R over Δ = W̃ - W, R quadratic."""

    uses_lr = False

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """Only the squared loss on pre-activations, alone or with a squared regularizer, is quadratic."""
        if type(loss) is not SquaredLoss:
            raise ValueError(
                f"{type(self).__name__} solves quadratic problems, and {loss!r} is none; use loss='squared' with it, "
                "or Anderson, Newton or FirstOrderSteps with this loss"
            )
        check_curvature(self, regularizer)


def damped_cholesky(gram: Tensor, damping: float, layer: str, solver: str) -> Tensor:
    """The Cholesky factors of gram + damping·I, with more damping where rounding made one of them indefinite.

    Args:
        gram: One symmetric matrix or a batch, (…, d, d).
        damping: λ.
        layer: The layer's name, for messages.
        solver: The solver's.

    Raises:
        RuntimeError: No damping helps; the matrix is not finite, say.
    """
    matrix = "a Hessian" if solver == "Newton" else "C"
    for attempt in range(12):
        damped = gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) * damping
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            if attempt:
                warnings.warn(
                    f"layer {layer!r}: {matrix} + λI was not positive definite in {gram.dtype}; λ was raised to "
                    f"{damping:.3g}. Give {solver} a larger damping",
                    stacklevel=2,
                )
            return factor
        mean = float(gram.diagonal(dim1=-2, dim2=-1).mean(-1).max())
        damping = max(10 * damping, torch.finfo(gram.dtype).eps * mean)
    raise RuntimeError(f"layer {layer!r}: {matrix} + λI could not be factorised even with λ = {damping:.3g}")


def wide(t: Tensor) -> Tensor:
    """In float32 at least, which factorisations need."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Exact(_Quadratic):
    """The minimum itself: W̃ = W - γ · ∂L/∂W · (C + λI)⁻¹ with C = XᵀX, by Cholesky factors (LocoProp-S solved exactly).

    This is K-FAC with its input factor alone (FOOF, Benzing 2022). A bias is one more column of the weight, with ones
    in X. Where a batch has fewer rows than columns, the N×N form (XXᵀ + λI) is factorised instead. A convolution's
    groups have a C each. `lr` and `local_steps` have no part in it: `activation_lr`, times what a scheduler has made of
    lr, is the step size.

    Args:
        damping: λ, > 0; the curvature of regularizers adds to it. A sum over rows as C is: it grows with the batch.
        relative: Whether λ is in units of C's mean diagonal entry, and so independent of the batch size.
        average: Decay of a running average of C per row, in [0, 1), as K-FAC keeps it; 0 uses this mini-batch alone.
            The average is kept between steps, (d_in + 1)² numbers per layer, and always takes the d_in × d_in form.

    Raises:
        TypeError: `damping` or `average` is not a number.
        ValueError: `damping` is not above 0, or `average` is outside [0, 1).
    """

    def __init__(self, damping: float = 1e-3, *, relative: bool = True, average: float = 0.0) -> None:
        check_range("damping", damping, 0)
        check_range("average", average, 0, 1, inclusive=True)
        self.damping = float(damping)
        self.relative = bool(relative)
        self.average = float(average)

    def solve(self, task: Task) -> None:
        """Jump to the minimum; see `Solver.solve`."""
        problem, inputs = task.problem, with_ones(task)
        inputs = inputs.to(torch.promote_types(problem.weight.dtype, torch.float32))
        # Matrices of each group; one group is one of them.
        if inputs.n < inputs.d_in and not self.average and not inputs.shared:
            x = inputs.dense().view(inputs.groups, inputs.n, inputs.d_in)
            scale = float(x.square().sum()) / (len(x) * inputs.d_in) if self.relative else 1.0
            damping = self._total(scale, problem, x)
            factor = damped_cholesky(x @ x.mT, damping, problem.rows.name, "Exact")
            residual = by_group(wide(problem.first_residual()).t(), len(x)).mT
            # r (C + λI)⁻¹ = (r - r Xᵀ(XXᵀ + λI)⁻¹X) / λ for the regularizer's gradient r at the old weights
            pull = self._pull(task, damping)
            if pull is not None:
                residual = residual - x @ by_group(pull, len(x)).mT
            change = (torch.cholesky_solve(residual, factor).mT @ x).flatten(0, 1)
            if pull is not None:
                change += pull
        else:
            gram = self._gram(inputs, task)
            scale = float(gram.diagonal(dim1=-2, dim2=-1).mean()) if self.relative else 1.0
            damping = self._total(scale, problem, gram)
            factor = damped_cholesky(gram, damping, problem.rows.name, "Exact")
            gradient = wide(joined(problem.first_gradient(), task))
            if gram.dim() == 2:
                change = torch.cholesky_solve(gradient.t(), factor).t()
            else:
                change = torch.cholesky_solve(by_group(gradient, len(gram)).mT, factor).mT.flatten(0, 1)
        move(task, -change)

    def _total(self, scale: float, problem: LocalProblem, like: Tensor) -> float:
        return max(self.damping * scale, torch.finfo(like.dtype).tiny) + curvature(problem)

    def _gram(self, inputs: Inputs, task: Task) -> Tensor:
        """C, or with its running average as if all rows had had it."""
        if not self.average:
            return inputs.gram()
        moments = averaged_moments(inputs, task, self.average)
        return moments * rows_of_groups(inputs).to(moments)

    def _pull(self, task: Task, damping: float) -> Tensor | None:
        """The regularizer's gradient at the old weights / λ, None where it is zero."""
        problem = task.problem
        if problem.regularizer is None:
            return None
        parts = [problem.regularizer.gradient(w, w) for w in problem.old]
        return wide(joined(parts, task)) / damping if any(bool(part.any()) for part in parts) else None

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of C, its factor and the two triangular systems, or of their N × N forms."""
        n, d_in, d_out, groups = size.n, size.d_in, size.d_out, size.groups
        if n < d_in and not self.average:
            return groups * (n * n * d_in + n**3 // 6) + d_out * n * n + size.product
        return groups * (n * d_in**2 + d_in**3 // 6) + d_out * d_in**2

    def __repr__(self) -> str:
        relative = ", relative" if self.relative else ""
        average = f", average={self.average:g}" if self.average else ""
        return f"Exact(damping={self.damping:g}{relative}{average})"


class ConjugateGradient(_Quadratic):
    """Conjugate gradients on (C + λI)Δᵀ = -(γ · ∂L/∂W)ᵀ, all units at once; no factorisation.

    An iteration costs two products over the rows, as a first-order step does, or one with C = XᵀX where that is
    cheaper. Each unit has its own step sizes. `lr` has no part in it: `activation_lr`, times what a scheduler has made
    of lr, is the step size.

    Args:
        iterations: At most so many, >= 1; None takes the layer's `local_steps`.
        tolerance: A unit stops when its residual has fallen by this factor, in [0, 1), or to rounding.
    """

    def __init__(self, iterations: int | None = None, *, tolerance: float = 1e-6) -> None:
        if iterations is not None:
            check_count("iterations", iterations)
        check_range("tolerance", tolerance, 0, 1, inclusive=True)
        self.iterations = iterations
        self.tolerance = float(tolerance)

    def solve(self, task: Task) -> None:
        """Iterate from the old weights; see `Solver.solve`."""
        x, problem = with_ones(task), task.problem
        iterations = self.iterations or task.steps
        gram = x.gram() if problem.size.prefers_gram(iterations) else None
        damping = curvature(problem)

        def image(direction: Tensor) -> Tensor:
            if gram is None:
                product = x.sum(x.apply(direction))
            elif gram.dim() == 2:
                product = direction @ gram
            else:
                product = (by_group(direction, len(gram)) @ gram).flatten(0, 1)
            return product.add_(direction, alpha=damping) if damping else product

        gradient = joined(problem.first_gradient(), task)
        check_finite(gradient, problem)
        move(task, conjugate_gradient(image, -gradient, iterations, self.tolerance))

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of all iterations, in the cheaper form; it may stop earlier."""
        return size.gradients(self.iterations or steps)

    def __repr__(self) -> str:
        return f"ConjugateGradient(iterations={self.iterations or 'local_steps'}, tolerance={self.tolerance:g})"
