"""What the nodes of the autograd graph stand for: changes of shape, transfer functions, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from torchloco import transfers as tf
from torchloco.transfers import Transfer, get_transfer

#: Nodes that move or cast entries and leave each as it is.
SHAPE_ONLY = frozenset(
    f"{name}Backward"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand"),
        *("Clone", "ToCopy", "Slice", "Split", "SplitWithSizes", "Select", "AsStrided", "Unbind", "Unflatten"),
        "custom BackwardHookFunction",  # put in by register_full_backward_hook
    )
)

BY_NODE: dict[str, Callable[[Any], Transfer]] = {
    **{
        f"{node}Backward": (lambda _, name=name: get_transfer(name))  # type: ignore[misc]
        for node, name in {
            "Tanh": "tanh",
            "Sigmoid": "sigmoid",
            "Relu": "relu",
            "Softmax": "softmax",
            "LogSoftmax": "softmax",
            "BinaryCrossEntropyWithLogits": "sigmoid",
            "MseLoss": "identity",
            "Hardsigmoid": "hardsigmoid",
            "LogSigmoid": "logsigmoid",
            "Gelu": "gelu",
            "Silu": "silu",
            "Mish": "mish",
            "Hardswish": "hardswish",
        }.items()
    },
    "LeakyReluBackward": lambda node: tf.leaky_relu(node._saved_negative_slope),
    "EluBackward": lambda node: (
        get_transfer("selu") if abs(node._saved_scale - 1.0507) < 1e-4 else tf.elu(node._saved_alpha, node._saved_scale)
    ),
    "CeluBackward": lambda node: tf.celu(node._saved_alpha),
    "HardtanhBackward": lambda node: (
        get_transfer("relu6")
        if (node._saved_min_val, node._saved_max_val) == (0, 6)
        else tf.hardtanh(node._saved_min_val, node._saved_max_val)
    ),
    "SoftplusBackward": lambda node: tf.softplus(node._saved_beta),
}


AXES_KEPT = frozenset(
    f"{name}Backward" for name in ("Clone", "ToCopy", "Alias", "Slice", "Split", "custom BackwardHookFunction")
)
AXES_MOVED = frozenset({"TBackward", "TransposeBackward", "PermuteBackward"})
SOFTMAX = frozenset({"SoftmaxBackward", "LogSoftmaxBackward"})
LOSSES = frozenset({"LogSoftmaxBackward", "BinaryCrossEntropyWithLogitsBackward", "MseLossBackward"})


def kind_of(node: Node) -> str:
    """A node's name without the overload's number: AddmmBackward0 → AddmmBackward. Users' own functions differ."""
    own = isinstance(node, BackwardCFunction)
    return ("custom " if own else "") + node.name().rstrip("0123456789")


def moved_axis(node: Node, axis: int | None, dims: int) -> tuple[int | None, int]:
    """Where a change of shape puts an axis, and how many dimensions there are then; None where the node does not say.

    Args:
        node: A node of `SHAPE_ONLY`.
        axis: The axis in its input, counted from the front, or None.
        dims: The number of the input's dimensions.
    """

    def front(value: int, count: int) -> int:  # negative numbers are saved as unsigned ones
        return value if value < count else value - (1 << 64) + count

    kind, saved = kind_of(node), cast(Any, node)
    if axis is None or kind in AXES_KEPT:
        return axis, dims
    if kind in ("TransposeBackward", "TBackward"):
        pair = (0, 1) if kind == "TBackward" else (front(saved._saved_dim0, dims), front(saved._saved_dim1, dims))
        return (pair[1 - pair.index(axis)] if axis in pair else axis), dims
    if kind == "PermuteBackward":
        return [front(dim, dims) for dim in saved._saved_dims].index(axis), dims
    if kind == "UnsqueezeBackward":
        return axis + (front(saved._saved_dim, dims + 1) <= axis), dims + 1
    return None, dims


def is_compiled(node: Node) -> bool:
    """Whether the node stands for a whole graph that torch.compile has compiled."""
    return kind_of(node) == "custom CompiledFunctionBackward"


def is_softsign(met: list[Node]) -> bool:
    """X / (1 + |x|), which torch records as its parts."""
    kinds = {kind_of(n): n for n in met}
    if set(kinds) != {"AbsBackward", "DivBackward"} or len(met) != 2:
        return False
    try:
        x, denominator = kinds["AbsBackward"]._saved_self, kinds["DivBackward"]._saved_other  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # freed by the backward pass
        return False
    return denominator.shape == x.shape and torch.allclose(denominator, 1 + x.abs())
