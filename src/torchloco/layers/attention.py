"""The projections of `nn.MultiheadAttention` as matrix problems.

They call no module, so no hook fires: the products with their weights are looked up in the autograd graph that a call
of the attention has built. What was multiplied is what the graph has saved of it for its own backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchloco.inputs import Dense, Grouped, Inputs
from torchloco.layers.base import Layer, Piece, as_rows

if TYPE_CHECKING:
    from torchloco.capture import Recorder

_SAVED = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self", "LinearBackward0": "_saved_input"}
"""Products of rows with a weight, and where they keep the rows."""


class Projection(Layer):
    """One weight of `nn.MultiheadAttention`: N = batch · length of what is projected; no transfer follows."""

    transfer = "identity"

    def __init__(self, name: str, module: nn.Module, weight: str, bias: str | None) -> None:
        super().__init__(name, module)
        self.weight_name, self.bias_name = weight, bias or ""

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Layer]:
        """The packed in-projection, or those of query, key and value if they differ in width, and the out-projection.

        The three have one bias between them, which goes to the fallback optimizer.
        """
        prefix = name + "." if name else ""
        if getattr(module, "in_proj_weight", None) is not None:
            layers: list[Layer] = [PackedProjection(prefix + "in_proj", module, "in_proj_weight", "in_proj_bias")]
        else:
            layers = [cls(f"{prefix}{part}_proj", module, f"{part}_proj_weight", None) for part in "qkv"]
        return [*layers, OutProjection(prefix + "out_proj", module, "weight", "bias")]

    def inputs(self, x: Tensor, output: Tensor | None) -> Dense:
        """What is projected, in (…, width)."""
        return Dense(as_rows(x))

    def watch(self, recorder: Recorder, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Let the recorder watch the products with the weight."""
        top = output[0].grad_fn
        # Reading what checkpointing or offloading has saved would run it again, or bring it back.
        if top is None or _saves_elsewhere():
            return
        outside = {t.grad_fn for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        for node, units in products(top, self.weight, outside):
            recorder.record_product(getattr(node, _SAVED[node.name()]), node, units)


class OutProjection(Projection):
    """`out_proj`: weight (E, E)."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the module that is never called."""
        return cast(nn.Parameter, cast(nn.Module, self.module.out_proj).weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """Its bias."""
        return cast("nn.Parameter | None", cast(nn.Module, self.module.out_proj).bias)


class PackedProjection(Projection):
    """`in_proj_weight`: weight (3E, E).

    In self-attention it is one product, d_out = 3E. Where query, key and value differ it is three, of E units each, and
    a problem of three groups: the rows of the shorter ones are filled up with zeros, which count for nothing.
    """

    def join(self, pieces: Sequence[Piece]) -> tuple[Inputs, Tensor, Tensor]:
        """See `Layer.join`."""
        size = self.d_out // 3
        if all(piece.units == slice(0, self.d_out) for piece in pieces):
            return super().join(pieces)
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], [], []]
        for piece in pieces:
            for k in range(piece.units.start // size, piece.units.stop // size):
                own = slice(k * size - piece.units.start, (k + 1) * size - piece.units.start)
                parts[k].append((piece.inputs.dense(), piece.a[:, own], piece.g[:, own]))
        counts = [sum(len(x) for x, _, _ in part) for part in parts]
        filled = pieces[0].a.new_zeros(3, 3, max(counts), size)  # X, A, G by group
        for k, part in enumerate(parts):
            for i, tensors in enumerate(zip(*part, strict=True)):
                filled[i, k, : counts[k]] = torch.cat(tensors)
        x, a, g = filled
        return Grouped(x, counts), a.transpose(0, 1).flatten(1), g.transpose(0, 1).flatten(1)


def _saves_elsewhere() -> bool:
    """Whether hooks on saved tensors are at work."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(False) is not None


def products(top: Node, weight: nn.Parameter, outside: set[Node | None]) -> Iterator[tuple[Node, slice]]:
    """The products with a weight, or with some of its rows, below a node, and which units they are.

    Args:
        top: Where to start.
        weight: The weight.
        outside: Nodes that are not looked beyond.
    """
    seen, stack = {None, *outside}, [top]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent, place in node.next_functions:
            if node.name() in _SAVED and (units := _units(parent, place, weight)) is not None:
                yield node, units
            elif parent is not None:
                stack.append(parent)


def _units(node: Node | None, place: int, weight: nn.Parameter) -> slice | None:
    """Which rows of the weight come out of a node at that place, None if it is not the weight."""
    start, stop = 0, len(weight)
    while node is not None:
        kind = node.name()
        if kind == "torch::autograd::AccumulateGrad":
            return slice(start, stop) if node.variable is weight else None  # type: ignore[attr-defined]
        if kind == "SplitBackward0":
            size = node._saved_split_size  # type: ignore[attr-defined]
            start, stop = place * size, (place + 1) * size
        elif kind == "SplitWithSizesBackward0":
            sizes = node._saved_split_sizes  # type: ignore[attr-defined]
            start, stop = sum(sizes[:place]), sum(sizes[: place + 1])
        elif kind not in ("TBackward0", "ToCopyBackward0"):
            return None
        node, place = node.next_functions[0]
    return None
