"""Cheaper gradients of a local problem: from some of its rows at a time, and in low precision."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torchloco.losses import MatchingLoss
from torchloco.problem import Gradients, LocalProblem


class SampledGradients:
    """Gradients at displaced weights from one part of the rows at a time::

        ∇J(W̃) ≈ ∇J(W) + N/n · Σ_{n rows of the part} (δ(W̃) - δ(W)) xᵀ

    ∇J(W) is autograd's, over all rows and at no cost, so that sampling and rounding touch only what the gradient has
    changed by since (as in SVRG, Johnson and Zhang 2013). Over the parts its mean is the exact gradient.
    Pre-activations at W are the forward pass's; only their change X(W̃ - W)ᵀ is computed in low precision, as the residual is a small
    difference of large numbers. For quadratic losses C = XᵀX can stand for the rows, where that is cheaper.

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
        torch.sub(new[0], self._problem.weight, out=self._displacement)
        bias_change = new[1] - self._problem.old[1] if len(new) > 1 else None
        by_part = self._by_gram if self._gram else self._by_rows
        changes, scale = by_part(j % self._parts, bias_change)
        gradients = [
            torch.add(first, change, alpha=scale, out=buffer)
            for first, change, buffer in zip(self._first, changes, self._buffers, strict=True)
        ]
        return self._problem.regularized(gradients, new)

    def _by_rows(self, k: int, bias_change: Tensor | None) -> tuple[Gradients, float]:
        """The gradient's change on part k, and what makes it an estimate of the whole."""
        x = self._rows(k)
        change = x @ self._displacement.t()
        if bias_change is not None:
            change = change + bias_change
        delta = self._residual_change(k, change)
        changes = [delta.to(self._dtype).t() @ x]
        if bias_change is not None:
            changes.append(delta.sum(0))
        return changes, self._problem.rows.x.shape[0] / max(1, len(x))

    def _by_gram(self, k: int, bias_change: Tensor | None) -> tuple[Gradients, float]:
        """The gradient's change from C."""
        changes = [self._displacement @ self._c]
        if bias_change is not None:
            changes[0] = torch.addr(changes[0].to(bias_change.dtype), bias_change, self._problem.row_sum)
            mixed = torch.mv(self._displacement.to(bias_change.dtype), self._problem.row_sum)
            changes.append(mixed.add_(bias_change, alpha=self._problem.rows.x.shape[0]))
        return changes, 1.0

    def _rows(self, k: int) -> Tensor:
        if k not in self._xs:
            self._xs[k] = self._problem.rows.x[k :: self._parts].to(self._dtype).contiguous()
        return self._xs[k]

    def _residual_change(self, k: int, change: Tensor) -> Tensor:
        """δ(W̃) - δ(W) of a part, given the change of its pre-activations."""
        problem = self._problem
        rows, part = problem.rows, slice(k, None, self._parts)
        if problem.quadratic:
            return change
        a = rows.a[part]
        if type(problem.loss) is MatchingLoss:
            if k not in self._ys:
                self._ys[k] = rows.transfer(a)
            return rows.transfer.apply_(a + change).sub_(self._ys[k])
        t = problem.t[part]
        return problem.loss.residual(a + change, t, rows.transfer) - problem.loss.residual(a, t, rows.transfer)

    @cached_property
    def _c(self) -> Tensor:
        x = self._rows(0)
        return x.t() @ x

    @cached_property
    def _displacement(self) -> Tensor:
        return torch.empty_like(self._problem.weight, dtype=self._dtype)

    @cached_property
    def _first(self) -> Gradients:
        return [g.clone() for g in self._problem.first_gradient(regularized=False)]

    @cached_property
    def _buffers(self) -> Gradients:
        return [torch.empty_like(p) for p in self._problem.old]
