"""Cheaper gradients of a local problem: from some of its rows at a time, and in low precision."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

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
        self._parts = max(1, min(parts, problem.rows.x.shape[0]))
        self._dtype = dtype
        self._xs: dict[int, Tensor] = {}
        self._ys: dict[int, Tensor] = {}

    def gradient(self, new: list[Tensor], j: int) -> Gradients:
        """The gradients of local step j. The memory is used again by the next call."""
        return self._problem.regularized(self._by_gram(new) if self._gram else self._by_rows(new, j % self._parts), new)

    def _by_rows(self, new: list[Tensor], k: int) -> Gradients:
        """From part k."""
        x = self._rows(k)
        delta = self._residual_change(k, x, new)
        scale = float(self._parts)  # parts may differ by a row; with this their mean is exact
        gradients = [self._sum(delta.t(), x, scale)]
        if len(new) > 1:
            first, factor = self._problem.first
            gradients.append(torch.add(first[1] * factor, delta.sum(0), alpha=scale, out=self._buffers[1]))
        return gradients

    def _sum(self, left: Tensor, right: Tensor, scale: float) -> Tensor:
        """∇J(W) + scale · left @ right."""
        (first, *_), factor = self._problem.first
        out = self._buffers[0]
        if self._dtype == first.dtype:
            return torch.addmm(first, left, right, beta=factor, alpha=scale, out=out)
        out.copy_(left.to(self._dtype) @ right)
        return out.mul_(scale).add_(first, alpha=factor)

    def _residual_change(self, k: int, x: Tensor, new: list[Tensor]) -> Tensor:
        """δ(W̃) - δ(W) of part k."""
        rows, loss = self._problem.rows, self._problem.loss
        a = rows.a[k :: self._parts]
        if self._dtype == a.dtype and not self._problem.quadratic:
            moved = x @ new[0].t() if len(new) == 1 else torch.addmm(new[1], x, new[0].t())
            if len(new) == 1 and self._problem.bias is not None:
                moved += self._problem.bias
        else:
            moved = (x @ self._displacement(new).t()).to(a.dtype)
            if len(new) > 1:
                moved += new[1] - self._problem.old[1]
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
        gradients = [self._sum(change, self._c, 1.0)]
        if len(new) > 1:
            bias_change, row_sum = new[1] - self._problem.old[1], self._problem.row_sum
            gradients[0].addr_(bias_change, row_sum)
            (_, first), factor = self._problem.first
            mixed = torch.addmv(first, self._scratch, row_sum, beta=factor, out=self._buffers[1])
            gradients.append(mixed.add_(bias_change, alpha=self._problem.rows.x.shape[0]))
        return gradients

    def _displacement(self, new: list[Tensor]) -> Tensor:
        """W̃ - W."""
        change = torch.sub(new[0], self._problem.weight, out=self._scratch)
        return change if self._dtype == change.dtype else self._narrow.copy_(change)

    def _rows(self, k: int) -> Tensor:
        if k not in self._xs:
            self._xs[k] = self._problem.rows.x[k :: self._parts].to(self._dtype).contiguous()
        return self._xs[k]

    @cached_property
    def _c(self) -> Tensor:
        x = self._rows(0)
        return x.t() @ x

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty_like(self._problem.weight)

    @cached_property
    def _narrow(self) -> Tensor:
        return torch.empty_like(self._problem.weight, dtype=self._dtype)

    @cached_property
    def _buffers(self) -> Gradients:
        return [torch.empty_like(p) for p in self._problem.old]
