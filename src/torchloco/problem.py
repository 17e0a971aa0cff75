"""One layer's local problem: rows, loss, target and regularizer; solvers ask it for gradients and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchloco.grouped import add_outer_, times_gram, times_vector
from torchloco.inputs import Inputs
from torchloco.losses import Loss, MatchingLoss, SquaredLoss, total
from torchloco.regularizers import Regularizer
from torchloco.targets import LayerRows, TargetRule, known_gradient_scale
from torchloco.transfers import Transfer

Gradients = list[Tensor]
"""Gradients of weight and bias, or of the weight alone where the bias takes no part."""


@dataclass(frozen=True)
class Size:
    """How large a local problem is, as far as it decides what solving it costs.

    Args:
        n: Rows.
        d_in: Columns of the weight as a matrix.
        d_out: Its rows, the units.
        quadratic: Whether the loss is the squared one on pre-activations, so that C = XᵀX can stand for the rows.
        free: Whether the first gradient is a multiple of autograd's, and costs nothing.
        safe: Whether the objective is followed as well; see `LocoProp`.
        groups: In how many groups with inputs of their own the units are.
        fill: The share of X's entries that products visit.
    """

    n: int
    d_in: int
    d_out: int
    quadratic: bool
    free: bool = True
    safe: bool = False
    groups: int = 1
    fill: float = 1.0

    @property
    def around(self) -> int:
        """Multiply-adds of the first gradient, and of the values before and after a safe solve."""
        return (0 if self.free else self.product) + (2 * self.product if self.safe else 0)

    @property
    def product(self) -> int:
        """Multiply-adds of one product over the rows, such as X W̃ᵀ."""
        return int(self.n * self.d_in * self.d_out * self.fill)

    def gradients(self, count: int, parts: int = 1) -> int:
        """Multiply-adds of that many further gradients, each over one of `parts` parts of the rows, or with C = XᵀX."""
        return self._by_gram(count) if self.prefers_gram(count, parts) else self._by_rows(count, parts)

    def prefers_gram(self, count: int, parts: int = 1) -> bool:
        """Whether they are cheaper with C = XᵀX at hand."""
        return self.quadratic and self._by_gram(count) < self._by_rows(count, parts)

    def _by_rows(self, count: int, parts: int) -> int:
        return count * 2 * self.product // parts

    def _by_gram(self, count: int) -> int:
        return (self.n * self.groups + count * self.d_out) * self.d_in**2


def is_quadratic(loss: Loss, transfer: Transfer) -> bool:
    """Whether this is the squared loss on pre-activations; with the identity transfer the matching loss is, too."""
    return type(loss) is SquaredLoss or (type(loss) is MatchingLoss and transfer.name == "identity")


@dataclass
class LocalProblem:
    """minimise over W̃, b̃:  Σ_rows loss(X W̃ᵀ + b̃ ; T) + regularizer(W̃, W).

    Args:
        rows: X, A, G and the transfer function, at the old weights.
        loss: The local loss.
        target: The rule that makes T from `rows`.
        regularizer: Keeps W̃ near W; None for none.
        weight: The old W, in the shape of the layer's parameter, as all weights and gradients here; see `matrix`. Not
            to be changed while the problem is solved.
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
    def _matrix_buffer(self) -> Tensor:
        size = self.size
        return self.weight.new_empty(size.d_out, size.d_in)

    @cached_property
    def _buffers(self) -> Gradients:
        buffers = [self.shaped(self._matrix_buffer)]
        if self.learn_bias and self.bias is not None:
            buffers.append(torch.empty_like(self.bias))
        return buffers

    def pre_activations(self, new: list[Tensor]) -> Tensor:
        """X W̃ᵀ + b̃, (N, d_out). The memory is the problem's and is used again by the next call."""
        bias = new[1] if len(new) > 1 else self.bias
        out = self._workspace if self.inputs.takes_out else None  # others make memory of their own
        return self.inputs.apply(self.matrix(new[0]), bias, out=out)

    def value(self, new: list[Tensor]) -> Tensor:
        """The local objective at the new weights, a scalar."""
        return self._regularized_value(self._loss_value(self.pre_activations(new)), new)

    def gradient(self, new: list[Tensor]) -> Gradients:
        """The objective's gradients at the new weights. The memory is used again by the next call."""
        delta = self.loss.residual_(self.pre_activations(new), self.t, self.rows.transfer)
        return self.regularized(self._products(delta), new)

    def value_and_gradient(self, new: list[Tensor]) -> tuple[Tensor, Gradients]:
        """Both of them for the matrix products of one; see `value` and `gradient`."""
        a = self.pre_activations(new)
        value = self._regularized_value(self._loss_value(a), new)
        delta = self.loss.residual_(a, self.t, self.rows.transfer)
        return value, self.regularized(self._products(delta), new)

    def first_residual(self) -> Tensor:
        """δ at the old weights, (N, d_out)."""
        if self._scale is None:
            return self.loss.residual(self.rows.a, self.t, self.rows.transfer)
        return self.rows.g * self._scale

    def first_gradient(self, *, regularized: bool = True) -> Gradients:
        """The gradients at the old weights: the ones autograd computed, times γ, where loss and target allow it.

        Args:
            regularized: Whether the regularizer's gradient is in them.
        """
        gradients, scale = self.first
        gradients = [torch.mul(g, scale, out=buffer) for g, buffer in zip(gradients, self._buffers, strict=True)]
        return self.regularized(gradients, self.old) if regularized else gradients

    def gram_gradient(self, new: list[Tensor]) -> Gradients:
        """The same gradients for a quadratic problem, from C = XᵀX instead of the rows."""
        first, scale = self.first
        weight, bias = (new[0], new[1]) if len(new) > 1 else (new[0], None)
        change = self.matrix(weight - self.weight)
        matrix = times_gram(change, self.gram, plus=self.matrix(first[0]), beta=scale, out=self._matrix_buffer)
        gradients = [matrix]
        if bias is not None and self.bias is not None:
            bias_change = bias - self.bias
            add_outer_(matrix, bias_change, self.row_sum)
            bias_gradient = times_vector(change, self.row_sum, plus=first[1], beta=scale, out=self._buffers[1])
            gradients.append(bias_gradient.add_(self.inputs.count_ones(bias_change)))
        gradients[0] = self.shaped(matrix)
        return self.regularized(gradients, new)

    def gram_value_and_gradient(self, new: list[Tensor]) -> tuple[Tensor, Gradients]:
        """Value and gradients of a quadratic problem from C; the value less what it is at the old weights."""
        gradients = self.gram_gradient(new)
        first, scale = self.first
        value = self.rows.a.new_zeros((), dtype=torch.float64)
        # The gradient is affine in the change, so the value is the change times the mean of first and last gradient.
        for w, old, f, g in zip(new, self.old, first, gradients, strict=True):
            loss_gradient = g if self.regularizer is None else g - self.regularizer.gradient(w, old)
            value = value + total((w - old) * (f * scale + loss_gradient)) / 2
        return self._regularized_value(value, new), gradients

    @property
    def quadratic(self) -> bool:
        """Whether C = XᵀX and the first gradient stand for the rows."""
        return is_quadratic(self.loss, self.rows.transfer)

    @property
    def size(self) -> Size:
        """What its cost depends on."""
        inputs, d_out = self.inputs, self.rows.a.shape[1]
        free = self._scale is not None
        return Size(inputs.all_rows, inputs.d_in, d_out, self.quadratic, free, groups=inputs.groups, fill=inputs.fill)

    @property
    def inputs(self) -> Inputs:
        """X."""
        return self.rows.inputs

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight or its gradient, in the parameter's shape, as a matrix (d_out, d_in)."""
        return self.inputs.matrix(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        """The opposite of `matrix`."""
        return self.inputs.shaped(matrix, self.weight.shape)

    @property
    def old(self) -> list[Tensor]:
        """The old weight, and the old bias if it is learnt."""
        return [self.weight, self.bias] if self.learn_bias and self.bias is not None else [self.weight]

    @cached_property
    def gram(self) -> Tensor:
        """C = XᵀX, (d_in, d_in), or (g, d_in, d_in) for g groups."""
        return self.inputs.gram()

    @cached_property
    def row_sum(self) -> Tensor:
        """Σ_rows X, (d_in,), or (g, d_in) for g groups."""
        return self.inputs.row_sum()

    @cached_property
    def _scale(self) -> float | None:
        return known_gradient_scale(self.rows, self.loss, self.target)

    @cached_property
    def first(self) -> tuple[Gradients, float]:
        """Gradients of the loss at the old weights, and what to multiply them by. Not to be written to."""
        if self._scale is not None:
            return self.gradients, self._scale
        return [g.clone() for g in self._products(self.first_residual())], 1.0

    def _loss_value(self, a: Tensor) -> Tensor:
        return self.inputs.total(self.loss.value(a, self.t, self.rows.transfer))

    def _products(self, delta: Tensor) -> Gradients:
        gradients = [self.shaped(self.inputs.sum(delta, out=self._matrix_buffer))]
        if len(self._buffers) > 1:
            gradients.append(self.inputs.sum_ones(delta, out=self._buffers[1]))
        return gradients

    def regularized(self, gradients: Gradients, new: list[Tensor]) -> Gradients:
        """The gradients with the regularizer's added, in place."""
        if self.regularizer is not None:
            for g, w, old in zip(gradients, new, self.old, strict=True):
                g.add_(self.regularizer.gradient(w, old))
        return gradients

    def _regularized_value(self, value: Tensor, new: list[Tensor]) -> Tensor:
        if self.regularizer is not None:
            for w, old in zip(new, self.old, strict=True):
                value = value + self.regularizer.value(w, old)
        return value
