"""Which transfer function follows which layer, read off the autograd graph while the first forward pass builds it.

Each layer's output has a node in the graph. When a later layer is called, or when the model returns, the graph is
walked from there back to those nodes; what stands between, past pure changes of shape, is what the pre-activation met.
The graph shows module, functional and in-place activations alike. What torch.compile has compiled is one node in it
that shows nothing; a model whose first pass meets such nodes is run once more, not compiled, for discovery alone.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchloco.layers import is_supported
from torchloco.nodes import (
    AXES_MOVED,
    BY_NODE,
    LOSSES,
    SHAPE_ONLY,
    SOFTMAX,
    is_compiled,
    is_softsign,
    kind_of,
    moved_axis,
)
from torchloco.registry import transfer_of_module
from torchloco.transfers import Transfer, get_transfer


@dataclass(frozen=True)
class Decision:
    """A layer's transfer function, why it was taken, and whether it is the network's loss that follows."""

    transfer: Transfer
    source: str
    at_loss: bool = False


@dataclass(frozen=True)
class Units:
    """Where the units of a layer are in its output: how many, and how many entries of each follow one another.

    The axis is counted from the front of so many dimensions.
    """

    count: int
    inner: int
    axis: int
    dims: int

    @classmethod
    def of(cls, output: Tensor, axis: int) -> Units:
        """Those of an output with its units on that axis, counted from the end."""
        front = axis + output.dim()
        return cls(output.shape[axis], math.prod(output.shape[front + 1 :]), front, output.dim())


@dataclass
class _Fate:
    """What becomes of a node's output, past changes of shape."""

    consumers: list[Node] = field(default_factory=list)
    units: dict[Node, int] = field(default_factory=dict)  # the units' axis in what a consumer takes, where it is known
    claims: list[Transfer] = field(default_factory=list)
    into_layer: bool = False
    at_end: bool = False
    axes_moved: bool = False


class Discovery:
    """Follows the outputs of the layers it is told of until each has met something.

    Args:
        model: The model; its modules' outputs, and modules of registered transfers, are watched as well.
        output: The transfer of what reaches the model's end untransformed; None if not given.
        given: What the user named, by layer.

    Attributes:
        decisions: What is known, by layer.
    """

    def __init__(self, model: nn.Module, output: Transfer | None, given: Mapping[str, Transfer]) -> None:
        self.output = output
        self._output_checked = output is None
        self.decisions = {name: Decision(transfer, "transfers=") for name, transfer in given.items()}
        self._outputs: dict[Node, tuple[str, Units]] = {}  # layers' names
        self._consumers: dict[Node, list[Node]] = {}
        self._claims: dict[Node, tuple[Transfer, set[Node]]] = {}  # and the nodes inside the claiming module
        self._provisional: dict[str, Decision] = {}
        self._unseen: set[str] = set()  # layers whose output went into compiled code
        self._replayed: set[str] = set()
        self._axes: dict[Node, tuple[int, tuple[int, ...]]] = {}  # of softmax nodes: axis, shape
        self._entered: set[Node] = set()
        self._ends: set[Node] = set()
        self._walked: set[Node] = set()
        self.handles = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its part of the graph is seen all the same
                continue
            if not is_supported(module) or module is model or any(module.children()):
                self.handles.append(
                    module.register_forward_hook(_EndHook(self, whole=module is model), with_kwargs=True)
                )
            transfer = transfer_of_module(module)
            if transfer is not None:
                self.handles.append(module.register_forward_hook(_ClaimHook(self, transfer)))

    def fix(self, name: str, transfer: str, source: str) -> None:
        """Settle the transfer of a layer that always has the same, unless the user named another."""
        self.decisions.setdefault(name, Decision(get_transfer(transfer), source))

    def enter(self, x: Tensor) -> None:
        """A layer is called with input `x`: walk what led to it."""
        if self._outputs and x.grad_fn is not None:
            self._walk(x.grad_fn)
            self._entered.add(x.grad_fn)

    def end(self, output: Any, *, whole: bool) -> None:
        """A module returned `output`: walk what led to it; decide if the module is the whole model."""
        if not self._outputs:
            return
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                self._walk(tensor.grad_fn)
                if whole:
                    self._ends.add(tensor.grad_fn)
        if whole:
            self.conclude()

    def follow(self, name: str, output: Tensor, units: int = -1) -> None:
        """Follow a layer's output, with its units on that axis, from here on, if its transfer is not known.

        Calls during a backward pass repeat a checkpointed part and do not show what comes after it.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if output.grad_fn is not None and name not in self.decisions and not in_backward:
            self._outputs[output.grad_fn] = (name, Units.of(output, units))

    def claim(self, transfer: Transfer, x: Tensor, output: Any) -> None:
        """A module of a registered transfer was called with `x` and returned `output`."""
        if not self._outputs or x.grad_fn is None:
            return
        inside: set[Node] = set()
        for tensor in _tensors(output):
            stack = [tensor.grad_fn]
            while stack:
                node = stack.pop()
                if node is not None and node is not x.grad_fn and node not in inside:
                    inside.add(node)
                    stack += [parent for parent, _ in node.next_functions]
        other = self._claims.get(x.grad_fn)
        if other is not None and other[0] is transfer:
            inside |= other[1]
        elif other is not None:  # two transfers of one tensor: neither's
            inside = set()
        self._claims[x.grad_fn] = (transfer, inside)

    def conclude(self) -> None:
        """Decide for the layers that met something, and let go of the graph.

        A layer that met nothing may have been called on its own, or its output returned in this pass alone; that is
        final only once a step is taken after it (`settle`).
        """
        decisions: dict[str, Decision] = {}
        for node, (name, units) in self._outputs.items():
            if is_compiled(node) or any(map(is_compiled, self._fate(node, units).consumers)):
                self._unseen.add(name)
                continue
            decision, met = self._decide(node, units)
            if not met:
                self._provisional[name] = decision
                continue
            other = decisions.setdefault(name, decision)
            if other.transfer.name != decision.transfer.name:  # one layer called in two places
                decisions[name] = Decision(get_transfer("identity"), f"{other.source}; {decision.source}")
        for memory in (self._outputs, self._consumers, self._claims, self._axes):
            memory.clear()
        for nodes in (self._entered, self._ends, self._walked):
            nodes.clear()
        self.decisions = {**decisions, **self.decisions}

    def replay(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once more, not compiled, if the pass that just ended went through compiled code.

        Random numbers and buffers are put back; the parameters' gradients are not touched.
        """
        unseen = self._unseen.difference(self.decisions, self._provisional, self._replayed)
        if unseen:
            self._replayed |= unseen  # once, whatever comes of it
            run = torch.compiler.disable(_run_eagerly)  # type: ignore[no-untyped-call]
            self.end(run(model, args, kwargs), whole=True)

    def settle(self, name: str) -> Transfer:
        """The final transfer of a layer that a step is taken for.

        Raises:
            RuntimeError: What follows the layer is inside compiled code, and was not seen otherwise.
        """
        if name not in self.decisions:
            if name in self._unseen and name not in self._provisional:
                raise RuntimeError(
                    f"what follows layer {name!r} is inside code compiled by torch.compile, where it cannot be seen. "
                    f"Name its transfer function, transfers={{{name!r}: 'relu'}} ('identity' for none), or run one "
                    "forward pass after building LocoProp and before compiling"
                )
            unseen = Decision(get_transfer("identity"), "what follows was not seen; name it by transfers=")
            self.decisions[name] = self._provisional.get(name, unseen)
        return self.decisions[name].transfer

    def known(self, name: str) -> Decision | None:
        """What is known of a layer so far."""
        return self.decisions.get(name, self._provisional.get(name))

    def warn_if_output_unused(self) -> None:
        """Warn, once, if a transfer was given for the output and no layer's pre-activations are the output.

        A model that computes its loss itself, or holds its criterion as a module, shows the loss: that is the output.
        """
        if self._output_checked or not self.decisions:
            return
        self._output_checked = True
        assert self.output is not None
        if not any(
            d.source in ("output=", "transfers=") or (d.transfer.name == self.output.name and d.at_loss)
            for d in self.decisions.values()
        ):
            warnings.warn(
                f"output= names {self.output.name!r}, but no layer's pre-activations are the model's output: "
                + "; ".join(f"{name}: {d.transfer.name} ({d.source})" for name, d in self.decisions.items())
                + ". Leave output= out, or name the layer's transfer by transfers=",
                stacklevel=4,
            )

    def _walk(self, root: Node) -> None:
        stack = [root]
        while stack:
            node = stack.pop()
            if node in self._walked:
                continue
            self._walked.add(node)
            if kind_of(node) in SOFTMAX:  # the backward pass will free what it has saved
                # Not of `_saved_result`, which checkpointing would run the forward pass again for.
                shape = node._input_metadata[0].shape
                axis = node._saved_dim  # type: ignore[attr-defined]
                self._axes[node] = (axis if axis < len(shape) else axis - (1 << 64) + len(shape), shape)
            if node in self._outputs:  # beyond it lies what an earlier walk has seen
                continue
            for parent, _ in node.next_functions:
                if parent is not None:
                    self._consumers.setdefault(parent, []).append(node)
                    stack.append(parent)

    def _decide(self, node: Node, units: Units) -> tuple[Decision, bool]:
        """The decision for a layer, and whether its output met anything."""
        fate = self._fate(node, units)
        identity = get_transfer("identity")
        if not (fate.consumers or fate.claims):
            if fate.into_layer:
                return Decision(identity, "met a layer"), True
            if self.output is not None:
                return Decision(self.output, "output="), False
            where = "the model's output" if fate.at_end else "met nothing inside a module"
            return Decision(identity, f"{where}; output= names its loss's transfer"), False
        kinds = sorted({kind_of(n) for n in fate.consumers})
        labels = sorted({transfer.name for transfer in fate.claims})
        labels += [kind.removesuffix("Backward") for kind in kinds]
        if fate.into_layer:
            labels.append("a layer")
        # A model may return its logits beside the loss that it computes of them; else part of the units go elsewhere.
        if fate.at_end and not (kinds and set(kinds) <= LOSSES):
            labels.append("the model's output")
        label = "met " + ", ".join(labels)
        if is_softsign(fate.consumers) and len(labels) == 2:
            return Decision(get_transfer("softsign"), "met Softsign"), True
        if len(labels) > 1:
            return Decision(identity, label), True
        if fate.claims:
            return Decision(fate.claims[0], label + "'s module"), True
        if kinds[0] not in BY_NODE:
            return Decision(identity, label), True
        if kinds[0] in SOFTMAX and not self._is_over_units(fate, units):
            return Decision(identity, label + " over another axis than the units"), True
        if kinds[0] == "LogSoftmaxBackward" and not self._ends_in_loss(fate.consumers):
            return Decision(identity, label + " that no loss follows"), True
        transfer = BY_NODE[kinds[0]](fate.consumers[0])
        if transfer.name == "relu" and self._is_squared(fate.consumers):
            return Decision(get_transfer("relu_squared"), label + ", squared"), True
        return Decision(transfer, label, at_loss=kinds[0] in LOSSES), True

    def _fate(self, node: Node, units: Units | None = None) -> _Fate:
        fate = _Fate()
        start = (None, 0) if units is None else (units.axis, units.dims)
        stack: list[tuple[Node, int | None, int]] = [(node, *start)]
        while stack:
            current, axis, dims = stack.pop()
            fate.into_layer |= current in self._entered
            fate.at_end |= current in self._ends
            inside: set[Node] = set()
            if current in self._claims:  # what the module does inside is its own affair
                transfer, inside = self._claims[current]
                fate.claims.append(transfer)
            for consumer in self._consumers.get(current, ()):
                if consumer in inside:
                    continue
                kind = kind_of(consumer)
                fate.axes_moved |= kind in AXES_MOVED
                if kind in SHAPE_ONLY:
                    stack.append((consumer, *moved_axis(consumer, axis, dims)))
                    continue
                fate.consumers.append(consumer)
                if axis is not None:
                    fate.units[consumer] = axis
        return fate

    def _is_over_units(self, fate: _Fate, units: Units) -> bool:
        """Whether the softmax runs over the layer's units.

        Past a view it is not known where they are: then over that many, and in their place unless axes were moved.
        """
        axes = [(n, *self._axes[n]) for n in fate.consumers if n in self._axes]
        return bool(axes) and all(
            shape[axis] == units.count
            and (
                axis == fate.units[n]
                if n in fate.units
                else fate.axes_moved or math.prod(shape[axis + 1 :]) == units.inner
            )
            for n, axis, shape in axes
        )

    def _is_squared(self, relus: list[Node]) -> bool:
        fates = [self._fate(relu) for relu in relus]
        return all(
            fate.consumers
            and not (fate.into_layer or fate.at_end or fate.claims)
            and all(kind_of(n) == "PowBackward" and getattr(n, "_saved_exponent", None) == 2 for n in fate.consumers)
            for fate in fates
        )

    def _ends_in_loss(self, softmaxes: list[Node]) -> bool:
        """Whether log-softmax is the model's output or goes into a negative log-likelihood."""
        fates = [self._fate(n) for n in softmaxes]
        return not any(fate.into_layer or fate.claims for fate in fates) and all(
            kind_of(n).startswith("NllLoss") for fate in fates for n in fate.consumers
        )


class _EndHook:
    """Walks from a module's outputs. Weak, and inert when copied, as every hook here."""

    def __init__(self, discovery: Discovery | None = None, *, whole: bool = False) -> None:
        self.discovery = (lambda: None) if discovery is None else weakref.ref(discovery)
        self.whole = whole

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        discovery = self.discovery()
        if discovery is not None:
            discovery.end(output, whole=self.whole)
            if self.whole:
                discovery.replay(module, args, kwargs)

    def __reduce__(self) -> tuple[type[_EndHook], tuple[()]]:
        return (_EndHook, ())


class _ClaimHook:
    """Tells discovery that a module of a registered transfer was called."""

    def __init__(self, discovery: Discovery | None = None, transfer: Transfer | None = None) -> None:
        self.discovery = (lambda: None) if discovery is None else weakref.ref(discovery)
        self.transfer = transfer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        discovery = self.discovery()
        if discovery is not None and self.transfer is not None and args and isinstance(args[0], Tensor):
            discovery.claim(self.transfer, args[0], output)

    def __reduce__(self) -> tuple[type[_ClaimHook], tuple[()]]:
        return (_ClaimHook, ())


def _run_eagerly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pass of a model, nothing of it compiled, that changes neither buffers nor randomness."""
    buffers = [(m, name, value) for m in model.modules() for name, value in m._buffers.items() if value is not None]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module, name, value in buffers:  # not written back: a graph may have saved them
            module._buffers[name] = value.detach().clone()
        with torch.random.fork_rng(list(devices)), torch.compiler.set_stance("force_eager"):
            return model.forward(*args, **kwargs)
    finally:
        for module, name, value in buffers:
            module._buffers[name] = value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name, None))
