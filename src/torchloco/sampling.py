"""Cheaper gradients of a local problem: from some of its rows at a time, and in low precision."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torchloco.grouped import add_outer_, times_gram, times_vector
from torchloco.inputs import Dense, Inputs
from torchloco.losses import MatchingLoss
from torchloco.problem import Gradients, LocalProblem


class SampledGradients:
    """Gradients at displaced weights from one part of the rows at a time::

        ∇J(W̃) ≈ ∇J(W) + parts · Σ_{rows of one part} (δ(W̃) - δ(W)) xᵀ

    ∇J(W) is autograd's, over all rows and at no cost, so that sampling and rounding touch only what the gradient has
    changed by since (as in SVRG, Johnson and Zhang 2013). Over the parts its mean is the exact gradient.
    Pre-activations at W are the forward pass's; only their change X(W̃ - W)ᵀ is computed in low precision, as the
    residual is a small difference of large numbers. For quadratic losses C = XᵀX can stand for the rows, where that is
    cheaper.

    Args:
        problem: The local problem.
        parts: How many parts the rows are cut into; part k holds the rows k, k + parts, k + 2·parts, …, which costs no
            index and is as good as random where rows that follow each other, as those of one sequence, are alike.
        dtype: Of the products over the rows; the rest keeps the weights' dtype.
        gram: Whether C = XᵀX, of all rows, is to stand for the rows.
    """

    def __init__(self, problem: LocalProblem, parts: int, dtype: torch.dtype, gram: bool = False) -> None:
        self._problem = problem
        self._gram = gram
        if gram:
            parts = 1
        self._parts = max(1, min(parts, problem.inputs.fewest_rows))
        self._dtype = dtype
        self._xs: dict[int, Inputs] = {}
        self._ys: dict[int, Tensor] = {}

    def gradient(self, new: list[Tensor], j: int) -> Gradients:
        """The gradients of local step j. The memory is used again by the next call."""
        return self._problem.regularized(self._by_gram(new) if self._gram else self._by_rows(new, j % self._parts), new)

    def add_(self, sums: Gradients, new: list[Tensor], j: int, alpha: float) -> None:
        """Add to `sums` alpha · the gradients of local step j; those of dense rows in the matrix product itself."""
        problem = self._problem
        matrix = problem.matrix(sums[0])
        x = self._rows(j % self._parts) if j else problem.inputs
        view = matrix.data_ptr() == sums[0].data_ptr()  # and no copy
        dense = isinstance(x, Dense) or j == 0
        if self._gram or not (view and dense) or self._dtype != sums[0].dtype or problem.regularizer is not None:
            gradients = self.gradient(new, j) if j else problem.first_gradient()
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient, alpha=alpha)
            return
        firsts, factor = problem.first
        for total, first in zip(sums, firsts, strict=True):
            total.add_(first, alpha=alpha * factor)
        if j == 0:  # nothing has changed since
            return
        delta = self._residual_change(j % self._parts, x, new)
        scale = alpha * self._parts
        matrix.addmm_(delta.t(), x.dense(), alpha=scale)  # with a beta it would take half as long again
        for total in sums[1:]:
            total.add_(x.sum_ones(delta), alpha=scale)

    def _by_rows(self, new: list[Tensor], k: int) -> Gradients:
        """From part k."""
        x = self._rows(k)
        delta = self._residual_change(k, x, new)
        scale = float(self._parts)  # parts may differ by a row; with this their mean is exact
        gradients = [self._sum(x, delta, scale)]
        if len(new) > 1:
            first, factor = self._problem.first
            gradients.append(torch.add(first[1] * factor, x.sum_ones(delta), alpha=scale, out=self._buffers[1]))
        return gradients

    def _sum(self, x: Inputs, delta: Tensor, scale: float) -> Tensor:
        """∇J(W) + scale · δᵀX."""
        (first, *_), factor = self._problem.first
        out = self._buffers[0]
        if self._dtype == first.dtype and isinstance(x, Dense):
            matrix = self._problem.matrix(first)
            return self._problem.shaped(torch.addmm(matrix, delta.t(), x.x, beta=factor, alpha=scale, out=self._matrix))
        out.copy_(self._problem.shaped(x.sum(delta.to(self._dtype))))
        return out.mul_(scale).add_(first, alpha=factor)

    def _residual_change(self, k: int, x: Inputs, new: list[Tensor]) -> Tensor:
        """δ(W̃) - δ(W) of part k."""
        rows, loss = self._problem.rows, self._problem.loss
        a = rows.a[k :: self._parts]
        if self._dtype == a.dtype:
            moved = x.apply(self._problem.matrix(new[0]), new[1] if len(new) > 1 else self._problem.bias)
            if self._problem.quadratic:
                return moved.sub_(a)
        else:
            moved = x.apply(self._displacement(new)).to(a.dtype)
            if len(new) > 1:
                moved += x.times_ones(new[1] - self._problem.old[1]).to(a.dtype)
            if self._problem.quadratic:
                return moved
            moved += a
        if type(loss) is MatchingLoss:
            if k not in self._ys:
                self._ys[k] = rows.transfer.apply_(a.clone())
            return rows.transfer.apply_(moved).sub_(self._ys[k])
        t = self._problem.t[k :: self._parts]
        return loss.residual(moved, t, rows.transfer) - loss.residual(a, t, rows.transfer)

    def _by_gram(self, new: list[Tensor]) -> Gradients:
        """From C."""
        change = self._displacement(new)
        (first, *firsts), factor = self._problem.first
        plus = self._problem.matrix(first)
        if self._dtype == first.dtype:
            matrix = times_gram(change, self._c, plus=plus, beta=factor, out=self._matrix)
        else:
            zero = change.new_zeros(())
            product = times_gram(change, self._c, plus=zero, beta=0.0, out=torch.empty_like(change))
            matrix = self._matrix.copy_(product).add_(plus, alpha=factor)
        gradients = [matrix]
        if len(new) > 1:
            bias_change, row_sum = new[1] - self._problem.old[1], self._problem.row_sum
            add_outer_(matrix, bias_change, row_sum)
            mixed = times_vector(self._scratch, row_sum, plus=firsts[0], beta=factor, out=self._buffers[1])
            gradients.append(mixed.add_(self._problem.inputs.count_ones(bias_change)))
        gradients[0] = self._problem.shaped(matrix)
        return gradients

    def _displacement(self, new: list[Tensor]) -> Tensor:
        """W̃ - W, as a matrix."""
        problem = self._problem
        change = torch.sub(problem.matrix(new[0]), problem.matrix(problem.weight), out=self._scratch)
        return change if self._dtype == change.dtype else self._narrow.copy_(change)

    def _rows(self, k: int) -> Inputs:
        if k not in self._xs:
            inputs = self._problem.inputs
            whole = self._parts == 1
            self._xs[k] = (inputs if whole else inputs.part(k, self._parts)).to(self._dtype)
        return self._xs[k]

    @cached_property
    def _c(self) -> Tensor:
        return self._rows(0).gram()

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty_like(self._matrix)

    @cached_property
    def _narrow(self) -> Tensor:
        return torch.empty_like(self._matrix, dtype=self._dtype)

    @cached_property
    def _matrix(self) -> Tensor:
        size = self._problem.size
        return self._problem.weight.new_empty(size.d_out, size.d_in)

    @cached_property
    def _buffers(self) -> Gradients:
        return [self._problem.shaped(self._matrix), *(torch.empty_like(p) for p in self._problem.old[1:])]
