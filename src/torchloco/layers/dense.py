"""Linear layers as matrix problems."""

from __future__ import annotations

from torch import Tensor

from torchloco.inputs import Dense, DenseTransposed
from torchloco.layers.base import Layer, as_rows


class LinearLayer(Layer):
    """`nn.Linear`: any number of leading dimensions, which all become rows; weight (out_features, in_features)."""

    def inputs(self, x: Tensor, output: Tensor | None) -> Dense:
        """The input."""
        return Dense(as_rows(x))


class TransposedLinearLayer(LinearLayer):
    """The same with a weight of shape (in_features, out_features), as the `Conv1D` of GPT-2 in transformers."""

    @property
    def d_out(self) -> int:
        """The number of units."""
        return self.weight.shape[1]

    def inputs(self, x: Tensor, output: Tensor | None) -> Dense:
        """The input."""
        return DenseTransposed(as_rows(x))
