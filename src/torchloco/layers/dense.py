"""`nn.Linear` as a matrix problem."""

from __future__ import annotations

from torch import Tensor

from torchloco.inputs import Dense
from torchloco.layers.base import Layer, as_rows


class LinearLayer(Layer):
    """`nn.Linear`: any number of leading dimensions, which all become rows; weight (out_features, in_features)."""

    def inputs(self, x: Tensor, output: Tensor | None) -> Dense:
        """The input."""
        return Dense(as_rows(x))
