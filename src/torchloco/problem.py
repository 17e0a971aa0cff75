"""One layer's local problem: its rows, its loss and target, its regularizer; solvers ask it for gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchloco.losses import Loss, SquaredLoss
from torchloco.regularizers import Regularizer
from torchloco.targets import LayerRows, TargetRule, known_gradient_scale

Gradients = list[Tensor]
"""Gradients of weight and bias, or of the weight alone where the bias takes no part."""


@dataclass
class LocalProblem:
    """minimise over W̃, b̃:  Σ_rows loss(X W̃ᵀ + b̃ ; T) + regularizer(W̃, W).

    Args:
        rows: X, A, G and the transfer function, at the old weights.
        loss: The local loss.
        target: The rule that makes T from `rows`.
        regularizer: Keeps W̃ near W; None for none.
        weight: The old W, (d_out, d_in). Not to be changed while the problem is solved.
        bias: The old b, (d_out,), or None.
        learn_bias: Whether b̃ is solved for; otherwise it stays at b.
        gradients: ∂L/∂W (and ∂L/∂b if it is learnt) as autograd computed them.
    """

    rows: LayerRows
    loss: Loss
    target: TargetRule
    regularizer: Regularizer | None
    weight: Tensor
    bias: Tensor | None
    learn_bias: bool
    gradients: Gradients

    @cached_property
    def t(self) -> Tensor:
        """T, the target, (N, d_out)."""
        t = self.target(self.rows)
        if t.shape != self.rows.a.shape:
            raise ValueError(
                f"layer {self.rows.name!r}: the target must have the shape of the pre-activations "
                f"{tuple(self.rows.a.shape)}, got {tuple(t.shape)}"
            )
        return t

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.empty_like(self.rows.a, memory_format=torch.contiguous_format)

    @cached_property
    def _buffers(self) -> Gradients:
        buffers = [torch.empty_like(self.weight)]
        if self.learn_bias and self.bias is not None:
            buffers.append(torch.empty_like(self.bias))
        return buffers

    def pre_activations(self, new: list[Tensor]) -> Tensor:
        """X W̃ᵀ + b̃, (N, d_out). The memory is the problem's and is used again by the next call."""
        bias = new[1] if len(new) > 1 else self.bias
        if bias is None:
            return torch.mm(self.rows.x, new[0].t(), out=self._workspace)
        return torch.addmm(bias, self.rows.x, new[0].t(), out=self._workspace)

    def value(self, new: list[Tensor]) -> Tensor:
        """The local objective at the new weights, a scalar."""
        value = self.loss.value(self.pre_activations(new), self.t, self.rows.transfer)
        if self.regularizer is not None:
            for w, old in zip(new, self._old, strict=True):
                value = value + self.regularizer.value(w, old)
        return value

    def gradient(self, new: list[Tensor]) -> Gradients:
        """The objective's gradients at the new weights. The memory is used again by the next call."""
        delta = self.loss.residual_(self.pre_activations(new), self.t, self.rows.transfer)
        return self._regularized(self._products(delta), new)

    def first_residual(self) -> Tensor:
        """δ at the old weights, (N, d_out)."""
        scale = known_gradient_scale(self.rows, self.loss, self.target)
        if scale is None:
            return self.loss.residual(self.rows.a, self.t, self.rows.transfer)
        return self.rows.g * scale

    def first_gradient(self, *, regularized: bool = True) -> Gradients:
        """The gradients at the old weights: the ones autograd computed, times γ, where loss and target allow it.

        Args:
            regularized: Whether the regularizer's gradient is in them.
        """
        scale = known_gradient_scale(self.rows, self.loss, self.target)
        if scale is None:
            gradients = self._products(self.first_residual())
        else:
            gradients = [
                torch.mul(g, scale, out=buffer) for g, buffer in zip(self.gradients, self._buffers, strict=True)
            ]
        return self._regularized(gradients, self._old) if regularized else gradients

    def gram_gradient(self, new: list[Tensor]) -> Gradients:
        """The same gradients for the squared loss, from C = XᵀX instead of the rows."""
        weight, bias = (new[0], new[1]) if len(new) > 1 else (new[0], None)
        change = weight - self.weight
        scale = known_gradient_scale(self.rows, self.loss, self.target)
        assert scale is not None  # see prefers_gram
        gradients = [torch.addmm(self.gradients[0], change, self._gram, beta=scale, out=self._buffers[0])]
        if bias is not None and self.bias is not None:
            bias_change = bias - self.bias
            gradients[0].addr_(bias_change, self._row_sum)
            bias_gradient = torch.addmv(self.gradients[1], change, self._row_sum, beta=scale, out=self._buffers[1])
            gradients.append(bias_gradient.add_(bias_change, alpha=self.rows.x.shape[0]))
        return self._regularized(gradients, new)

    def prefers_gram(self, steps: int) -> bool:
        """Whether the Gram form applies and costs fewer multiply-adds for that many gradients after the first."""
        if type(self.loss) is not SquaredLoss or known_gradient_scale(self.rows, self.loss, self.target) is None:
            return False
        n, d_in = self.rows.x.shape
        d_out = self.weight.shape[0]
        return n * d_in**2 + steps * d_out * d_in**2 < steps * 2 * n * d_out * d_in

    @cached_property
    def _old(self) -> list[Tensor]:
        return [self.weight, self.bias] if self.learn_bias and self.bias is not None else [self.weight]

    @cached_property
    def _gram(self) -> Tensor:
        return self.rows.x.t() @ self.rows.x

    @cached_property
    def _row_sum(self) -> Tensor:
        return self.rows.x.sum(0)

    def _products(self, delta: Tensor) -> Gradients:
        gradients = [torch.mm(delta.t(), self.rows.x, out=self._buffers[0])]
        if len(self._buffers) > 1:
            gradients.append(torch.sum(delta, 0, out=self._buffers[1]))
        return gradients

    def _regularized(self, gradients: Gradients, new: list[Tensor]) -> Gradients:
        if self.regularizer is not None:
            for g, w, old in zip(gradients, new, self._old, strict=True):
                g.add_(self.regularizer.gradient(w, old))
        return gradients
