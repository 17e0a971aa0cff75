"""What the optimizer asks of a layer: how a module's call becomes a matrix problem."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from torchloco.inputs import Inputs, stacked

if TYPE_CHECKING:
    from torchloco.capture import Recorder


@dataclass
class Piece:
    """One call as rows.

    Args:
        inputs: X.
        a: Pre-activations, (N, units).
        g: The gradient at them.
        units: Which units of the layer it is about.
    """

    inputs: Inputs
    a: Tensor
    g: Tensor
    units: slice


class Layer(ABC):
    """A module whose output is linear in its weight: rows X of shape (N, d_in) times a matrix (d_out, d_in), plus bias.

    Yours needs `inputs`, and `units` or `rows` where the units are not the output's last axis. `register_layer` makes
    it known.

    Args:
        name: The layer's name in the model.
        module: The module.
    """

    #: Which of the module's parameters are weight and bias.
    weight_name, bias_name = "weight", "bias"
    #: The axis of the output that holds the units.
    units: int = -1
    #: The name of the transfer that always follows; None where the model shows it.
    transfer: str | None = None

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    @abstractmethod
    def inputs(self, x: Tensor, output: Tensor | None) -> Inputs:
        """The rows that the input of one call stands for, in the order of `rows`; without gradients, x is not changed.

        Args:
            x: The input, the first argument of the module's forward.
            output: What the forward returned, for its shape; its values may have been overwritten since. None for
                layers that say themselves what to watch.
        """

    def rows(self, output: Tensor) -> Tensor:
        """The output, or the gradient at it, as rows (N, d_out)."""
        return as_rows(output.movedim(self.units, -1))

    def join(self, pieces: Sequence[Piece]) -> tuple[Inputs, Tensor, Tensor]:
        """X, A and G of all calls together."""
        a, g = (t[0] if len(t) == 1 else torch.cat(t) for t in ([p.a for p in pieces], [p.g for p in pieces]))
        return stacked([piece.inputs for piece in pieces]), a, g

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        """The layers that a module is; most are one."""
        return [cls(name, module)]

    @property
    def weight(self) -> nn.Parameter:
        """The weight that the module has now, in any shape."""
        return cast(nn.Parameter, getattr(self.module, self.weight_name, None))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that the module has now, (d_out,), or None."""
        return getattr(self.module, self.bias_name, None)

    @property
    def params(self) -> list[nn.Parameter]:
        """Weight, and bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def d_out(self) -> int:
        """The number of units."""
        return self.weight.shape[0]

    def is_solvable(self) -> bool:
        """Whether weight and bias are parameters of floating point, not computed as a parametrization computes them."""
        return all(isinstance(p, nn.Parameter) and p.is_floating_point() for p in self.params)

    def watch(self, recorder: Recorder, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Let the recorder watch a forward call. Returns the output to use from here on, or None."""
        if not output.requires_grad:
            return None
        x = args[0] if args else kwargs.get("input", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))
        return None if x is None else recorder.record(x, output)


def as_rows(tensor: Tensor) -> Tensor:
    """(…, d) → (N, d), without a copy where the memory allows it; jagged and sparse tensors, too."""
    if tensor.layout == torch.jagged:
        tensor = tensor.values()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
