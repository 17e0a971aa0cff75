"""How a module becomes a matrix problem: rows X of shape (N, d_in) times a weight of shape (d_out, d_in).

`nn.Linear`: any number of leading dimensions, which all become rows; weight (out_features, in_features).
"""

from __future__ import annotations

import math
from typing import TypeGuard, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def is_supported(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this module is a layer with a local problem.

    Subclasses that compute something else than `nn.Linear.forward` are not, nor is the projection inside
    `nn.MultiheadAttention`, whose forward is never called, nor a layer whose weight is computed (a parametrization).
    """
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward
        and isinstance(weight := module._parameters.get("weight"), nn.Parameter)
        and weight.is_floating_point()
    )


def weight_of(module: nn.Linear) -> nn.Parameter:
    """The weight, (d_out, d_in)."""
    return cast(nn.Parameter, module.weight)


def bias_of(module: nn.Linear) -> nn.Parameter | None:
    """The bias, (d_out,), or None."""
    return module._parameters["bias"]


def as_rows(tensor: Tensor) -> Tensor:
    """(…, d) → (N, d), without a copy where the memory allows it."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
