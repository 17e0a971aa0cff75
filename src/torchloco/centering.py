"""Local problems in coordinates in which a layer's inputs have mean zero.

With μ the mean of the rows of X, X W̃ᵀ + 1 b̃ᵀ = (X - 1 μᵀ) W̃ᵀ + 1 b̃′ᵀ where b̃′ = b̃ + W̃ μ. In W̃ and b̃′ it is the same
problem, and another one to descend: its curvature is (X - 1 μᵀ)ᵀ(X - 1 μᵀ) = C - N μ μᵀ. Where inputs are far from zero
on average, as behind a ReLU or of images, N μ μᵀ is by far the largest part of C, and holds the learning rate down
(LeCun, Bottou, Orr and Müller 1998; Schraudolph 1998).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from torchloco.grouped import add_outer_, along, minus_outer
from torchloco.inputs import Dense, Inputs
from torchloco.problem import LocalProblem
from torchloco.solvers import Task


class CenteredInputs(Inputs):
    """X - 1 μᵀ.

    Args:
        inputs: X, without rows that only fill up.
        mean: μ, (d_in,), or (g, d_in) for g groups.
    """

    def __init__(self, inputs: Inputs, mean: Tensor) -> None:
        super().__init__(inputs.n, inputs.d_in, inputs.groups, inputs.fill)
        self._inputs, self._mean = inputs, mean
        self.shared, self.takes_out = inputs.shared, inputs.takes_out

    @property
    def all_rows(self) -> int:
        """See `Inputs.all_rows`."""
        return self._inputs.all_rows

    @property
    def fewest_rows(self) -> int:
        """See `Inputs.fewest_rows`."""
        return self._inputs.fewest_rows

    @property
    def group_rows(self) -> list[int]:
        """See `Inputs.group_rows`."""
        return self._inputs.group_rows

    def total(self, t: Tensor) -> Tensor:
        """See `Inputs.total`."""
        return self._inputs.total(t)

    def largest(self, t: Tensor) -> Tensor:
        """See `Inputs.largest`."""
        return self._inputs.largest(t)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See `Inputs.blocks`."""
        for rows, x in self._inputs.blocks():
            yield rows, x - (self._mean if self._mean.dim() == 1 else self._mean[:, None])

    def part(self, k: int, parts: int) -> Inputs:
        """See `Inputs.part`; few rows of a matrix are centered at once."""
        if isinstance(self._inputs, Dense):  # in one pass
            return self._inputs.having(self._inputs.x[k::parts] - self._mean)
        part = self._inputs.part(k, parts)
        return part.having(part.x - self._mean) if isinstance(part, Dense) else CenteredInputs(part, self._mean)

    def to(self, dtype: torch.dtype) -> CenteredInputs:
        """See `Inputs.to`."""
        return CenteredInputs(self._inputs.to(dtype), self._mean.to(dtype))

    def matrix(self, weight: Tensor) -> Tensor:
        """See `Inputs.matrix`."""
        return self._inputs.matrix(weight)

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """See `Inputs.shaped`."""
        return self._inputs.shaped(matrix, shape)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        of_mean = along(weight, self._mean).neg_()
        return self._inputs.apply(weight, of_mean if bias is None else of_mean.add_(bias), out=out)

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        return add_outer_(self._inputs.sum(delta, out=out), -self._inputs.sum_ones(delta), self._mean)

    def sum_ones(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum_ones`."""
        return self._inputs.sum_ones(delta, out=out)

    def gram(self) -> Tensor:
        """See `Inputs.gram`; of the centered rows, as in C - N μ μᵀ most of the digits may go."""
        return self.total(super().gram())

    def row_sum(self) -> Tensor:
        """See `Inputs.row_sum`; zero to rounding, where these are all rows."""
        return self.total(super().row_sum())

    def squares(self) -> float:
        """See `Inputs.squares`."""
        return float(self.gram().diagonal(dim1=-2, dim2=-1).sum())


@dataclass
class CenteredProblem(LocalProblem):
    """A local problem in W̃ and b̃′ = b̃ + W̃ μ; `bias` and `gradients` are those of b′ and of X - 1 μᵀ.

    Args:
        mean: μ.
    """

    mean: Tensor

    @property
    def inputs(self) -> Inputs:
        """X - 1 μᵀ; a target still sees X."""
        return self._centered_inputs

    @cached_property
    def _centered_inputs(self) -> CenteredInputs:
        return CenteredInputs(self.rows.inputs, self.mean)


def centered_problem(problem: LocalProblem) -> CenteredProblem | None:
    """The same problem with centered inputs, None where there is no bias to make up for it (or rows only fill up)."""
    inputs = problem.inputs
    # What decides must be the same in all processes that share a batch, so it is not `inputs.mask`.
    rows_only = set(inputs.group_rows) == {inputs.all_rows}
    if problem.bias is None or not problem.learn_bias or not rows_only or not inputs.all_rows:
        return None
    mean = inputs.row_sum() / inputs.all_rows
    given = {field.name: getattr(problem, field.name) for field in fields(LocalProblem)}
    weight, bias = problem.gradients
    given["gradients"] = [problem.shaped(minus_outer(problem.matrix(weight), bias, mean)), bias]
    given["bias"] = problem.bias + along(problem.matrix(problem.weight), mean)
    return CenteredProblem(**given, mean=mean)


@contextmanager
def centered(task: Task) -> Iterator[Task]:
    """The task with centered inputs, where that can be; its bias is b′ meanwhile."""
    problem = centered_problem(task.problem)
    if problem is None or problem.bias is None:
        yield task
        return
    weight, bias = task.params
    bias.copy_(problem.bias)
    try:
        yield replace(task, problem=problem)
    finally:
        bias.sub_(along(problem.matrix(weight.data), problem.mean))
