"""A layer while an optimizer is attached to it, and how its captured calls become the rows of its local problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.optim import Optimizer

from torchloco.capture import Capture, Recorder, gradient_factor
from torchloco.layers import as_rows
from torchloco.targets import LayerRows
from torchloco.transfers import Transfer


@dataclass
class AttachedLayer:
    """A supported layer that an optimizer solves for.

    Args:
        name: Its name in the model.
        weight: (d_out, d_in).
        bias: (d_out,), or None.
        learn_bias: Whether the bias takes part in the local problem.
        inner: The optimizer of the local steps, if the solver has one.
        recorder: Its captured calls.
        rows: The matrix problem of the step under way.
    """

    name: str
    weight: Parameter
    bias: Parameter | None
    learn_bias: bool
    inner: Optimizer | None
    recorder: Recorder
    rows: LayerRows | None = None

    @property
    def params(self) -> list[Parameter]:
        """What is solved for: the weight, and the bias if it is learnt."""
        return [self.weight, self.bias] if self.learn_bias and self.bias is not None else [self.weight]

    def release(self) -> None:
        """Let go of the captured calls and the rows made of them."""
        self.recorder.captures.clear()
        self.rows = None

    def collect(self, transfer: Transfer, activation_lr: float) -> float | None:
        """Make `rows` from all captured calls, in the weight's dtype.

        Args:
            transfer: The layer's transfer function.
            activation_lr: γ.

        Returns:
            What G must be multiplied by to agree with the weight's `.grad`; None where that cannot be told.

        Raises:
            RuntimeError: The input was overwritten or is on another device, or `.grad` belongs to another pass.
        """
        calls = [self._matrices(call) for call in self.recorder.captures]
        x, a, g = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*calls, strict=True))
        assert self.weight.grad is not None
        rounded = any(t.dtype != self.weight.dtype for call in self.recorder.captures for t in (call.x, call.a, call.g))
        factor, remainder, tolerance = gradient_factor(self.weight.grad, x, g)
        if remainder > max(tolerance, 0.05 if rounded else 0.003):
            raise RuntimeError(
                f"layer {self.name!r}: its gradient does not belong to the captured rows (relative difference "
                f"{remainder:.2g}). Supported: gradients of the passes since the last step() or zero_grad() of this "
                "optimizer, scaled or clipped by norm. Call optimizer.zero_grad() before each backward pass, and do "
                "not clip by value or edit .grad otherwise"
            )
        self.rows = LayerRows(self.name, x, a, g, transfer, activation_lr)
        return factor

    def _matrices(self, call: Capture) -> tuple[Tensor, Tensor, Tensor]:
        """X, A and G of one call."""
        if call.input_changed:
            raise RuntimeError(
                f"the input of layer {self.name!r} was overwritten between its forward pass and step(); "
                "pass a copy, or call step() before writing to it (torch.compile does so too, and is not supported yet)"
            )
        if call.x.device != self.weight.device:
            raise RuntimeError(
                f"layer {self.name!r}: its input was on {call.x.device}, its weight is on {self.weight.device}; "
                "move the model before the forward pass, not after"
            )
        dtype = self.weight.dtype
        x = as_rows(call.x).to(dtype)
        # An in-place activation has overwritten the pre-activations; lower precision has rounded them.
        stale = call.output_changed or call.a.dtype != dtype
        a = linear(x, self.weight, self.bias) if stale else as_rows(call.a)
        return x, a, as_rows(call.g).to(dtype)
