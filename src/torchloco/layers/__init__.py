"""Which modules are layers with a local problem, and how a module of one's own becomes one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchloco.layers.attention import Projection
from torchloco.layers.base import Layer
from torchloco.layers.convolution import CONVOLUTIONS
from torchloco.layers.dense import LinearLayer, TransposedLinearLayer

__all__ = ["SUPPORTED", "Layer", "is_supported", "layers_of", "register_layer"]

SUPPORTED = (
    "nn.Linear, nn.Conv1d to Conv3d, nn.ConvTranspose1d to ConvTranspose3d, nn.MultiheadAttention, transformers' "
    "Conv1D, and what register_layer was told of"
)

# The projection inside nn.MultiheadAttention is a Linear whose forward is never called.
_kinds: dict[type[nn.Module], type[Layer] | None] = {
    NonDynamicallyQuantizableLinear: None,
    nn.Linear: LinearLayer,
    **CONVOLUTIONS,
    nn.MultiheadAttention: Projection,
}

# Those of other libraries, which need not be installed.
_by_name: dict[str, type[Layer]] = {"transformers.pytorch_utils.Conv1D": TransposedLinearLayer}


def register_layer(module: type[nn.Module], layer: type[Layer]) -> None:
    """Make modules of a class layers with a local problem, in optimizers that are built afterwards.

    Subclasses are as well, unless they override forward. What was known of the class before is replaced.

    Args:
        module: A class of `nn.Module`.
        layer: How its calls become rows: a class derived from `Layer`.

    Raises:
        TypeError: One of them is something else.
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_layer takes a class of nn.Module first, got {module!r}")
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise TypeError(f"register_layer takes a class derived from torchloco.Layer second, got {layer!r}")
    _kinds[module] = layer


def is_supported(module: nn.Module) -> bool:
    """Whether this module is a layer with a local problem, or several."""
    return bool(layers_of("", module))


def layers_of(name: str, module: nn.Module) -> list[Layer]:
    """The layers that a module is; none for a module that is not supported.

    Subclasses that compute something else than their class are not, nor is a layer whose weight is computed (a
    parametrization).
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _kinds or _name_of(cls) in _by_name), None)
    kind = None if cls is None else _kinds.get(cls, _by_name.get(_name_of(cls)))
    if cls is None or kind is None:
        return []
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(cls, method, None):
            return []
    return [layer for layer in kind.of(name, module) if layer.is_solvable()]


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
