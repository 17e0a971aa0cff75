"""All contact with hooks: they record what enters and leaves a layer, and the gradient that comes back.

A forward hook keeps the layer's input and output of one call; a hook on the output tensor commits them when the
backward pass brings their gradient. So forward and backward are paired by closure: calls in eval mode or without
gradients leave nothing behind, a layer may be called several times, and recomputed calls are recorded once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from torchloco.distributed import Alone, Peers, peers_now
from torchloco.grouped import by_group
from torchloco.inputs import Inputs
from torchloco.layers import Layer

Observer = Callable[["Recorder", Tensor, Tensor], None]
"""Told of each recorded forward call: (recorder, input, output)."""


@dataclass(frozen=True)
class Call:
    """One forward call of a layer: its input and output, as the module has them, and its weights' state then.

    The output is None where only a product with the weight, or with some of its units, was seen in the autograd graph.
    """

    x: Tensor
    a: Tensor | None
    versions: tuple[int, int]
    weights: tuple[int, ...]
    peers: Peers
    units: slice = field(default_factory=lambda: slice(None))

    @property
    def input_changed(self) -> bool:
        """Whether the input was written to after the forward pass."""
        return self.x._version != self.versions[0]

    @property
    def output_changed(self) -> bool:
        """Whether the output was written to after the forward pass, as an in-place activation does, or not seen."""
        return self.a is None or self.a._version != self.versions[1]


@dataclass
class Capture:
    """A call and the gradient at its output; several backward passes through the same call add up."""

    call: Call
    g: Tensor
    task: int  # the backward pass that brought it


class Recorder:
    """The captures of one layer since the last step.

    A capture is pending until the backward pass has accumulated the weight's gradient as well. So passes that only ask
    for other gradients, by `torch.autograd.grad`, leave nothing behind.

    Args:
        layer: The layer.
        observer: Weak reference to a callable (recorder, input, output), called at each recorded forward call.

    Raises:
        RuntimeError: Another live recorder is attached to the layer.
    """

    def __init__(self, layer: Layer, observer: weakref.WeakMethod[Observer]) -> None:
        check_free(layer)
        drop_inert_hooks(layer.module)
        self.layer = layer
        self.weight = layer.weight
        self.called = False
        self.peers: Peers = Alone()
        self._first_gradient = self._gradient_now()
        self.captures: list[Capture] = []
        self._pending: list[Capture] = []
        self._observer = observer
        # First, since the user's own hooks may return another output, which is no pre-activation.
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_hook(_ForwardHook(self), with_kwargs=True, prepend=True)
        ]

    def record(self, x: Tensor, output: Tensor) -> Tensor:
        """Watch one call. Returns the output to use from here on."""
        self._watch_weight()
        output = _own_node(output)
        observe = self._observer()
        if observe is not None:
            observe(self, x, output)
        call = Call(x.detach(), output.detach(), (x._version, output._version), self.weights_now(), self.peers)
        owner = weakref.ref(self)

        def arrive(g: Tensor) -> None:
            recorder = owner()
            if recorder is not None:
                recorder.arrive(call, g)

        output.register_hook(arrive)  # type: ignore[no-untyped-call]
        return output

    def record_product(self, x: Tensor, node: Node, units: slice) -> None:
        """Watch a product of rows with these units of the weight, by its node in the autograd graph."""
        self._watch_weight()
        call = Call(x.detach(), None, (x._version, 0), self.weights_now(), self.peers, units)
        owner = weakref.ref(self)

        def arrive(gradients: tuple[Tensor | None, ...]) -> None:
            recorder = owner()
            if recorder is not None and gradients[0] is not None:
                recorder.arrive(call, gradients[0])

        node.register_prehook(arrive)

    def _watch_weight(self) -> None:
        if len(self._handles) == 1:  # not before: a frozen weight takes no hook
            hook = _AccumulateHook(self)
            self._handles.append(self.weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def arrive(self, call: Call, g: Tensor) -> None:
        """A backward pass brought the gradient at a call's output."""
        task = torch._C._current_graph_task_id()
        if self.weight.grad is None:  # cleared since, by model.zero_grad() for one
            self.captures = []
        self._pending = [capture for capture in self._pending if capture.task == task]
        self._pending.append(Capture(call, g.detach() if g.requires_grad else g, task))

    def accumulated(self) -> None:
        """A backward pass accumulated the weight's gradient: what it brought before is part of that."""
        task = torch._C._current_graph_task_id()
        for capture in self._pending:
            if capture.task != task:
                continue
            same = next((c for c in self.captures if c.call is capture.call), None)
            if same is None:
                self.captures.append(capture)
            else:
                same.g = same.g + capture.g
        self._pending = []

    def collected(self) -> list[Capture]:
        """The captures; the pending ones of the last backward pass if its gradients were assigned by hand."""
        return self.captures or self._pending

    def clear(self) -> None:
        """Let go of all captures."""
        self.captures, self._pending = [], []

    def is_bypassed(self) -> bool:
        """Whether the weight has got a gradient without any call of its module."""
        gradient = self._gradient_now()
        return not self.called and gradient is not None and gradient != self._first_gradient

    def _gradient_now(self) -> tuple[int, int] | None:
        """What changes when the weight's gradient is replaced or written to."""
        gradient = self.weight.grad
        return None if gradient is None else (id(gradient), gradient._version)

    def weights_now(self) -> tuple[int, ...]:
        """What changes when the weight or the bias is replaced or written to."""
        return tuple(value for p in self.layer.params for value in (id(p), p._version))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class _AccumulateHook:
    """Tells its recorder, held weakly, that the weight's gradient was accumulated."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = (lambda: None) if recorder is None else weakref.ref(recorder)

    def __call__(self, weight: Tensor) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.accumulated()

    def __reduce__(self) -> tuple[type[_AccumulateHook], tuple[()]]:
        return (_AccumulateHook, ())


class _ForwardHook:
    """Holds its recorder weakly; copies, as `deepcopy(model)` or `torch.save(model)` make them, are inert."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = (lambda: None) if recorder is None else weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        recorder = self.recorder()
        if recorder is None:
            return None
        # Re-entrant checkpointing recomputes outside of the wrapper that ran the pass, which had no gradients then.
        if torch._C._current_graph_task_id() == -1:
            recorder.peers = peers_now()
        if not torch.is_grad_enabled():
            return None
        # Other weights in its place (functional_call, a parametrization) are not solved for; nor are frozen ones.
        if recorder.layer.weight is not recorder.weight or not recorder.weight.requires_grad:
            return None
        recorder.called = True
        return recorder.layer.watch(recorder, args, kwargs, output)

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return (_ForwardHook, ())


def gradient_factor(
    gradient: Tensor, inputs: Inputs, g: Tensor, *, rounded_to: torch.dtype | None = None
) -> tuple[float | None, float, float]:
    """The s with gradient ≈ s · GᵀX, and how far off it is relative to the gradient.

    A gradient scaler or norm clipping multiplies `.grad` but not the captured G; s makes them agree again. A large
    remainder says that they belong to different passes. Both are taken along one fixed dense direction v, which costs
    three matrix-vector products instead of a matrix product. Where GᵀX is only rounding error, s cannot be told: None.

    Args:
        gradient: The weight's `.grad` as a matrix, (d_out, d_in).
        inputs: X.
        g: G, (N, d_out).
        rounded_to: The low precision that the gradient was rounded to. The entries may then cancel in any one direction
            and leave nothing but rounding, so that the whole product is taken.

    Returns:
        s or None, the remainder, and how large rounding may make that.
    """
    # Products of low-precision numbers are taken in float32, whose rounding is what the checks below know.
    wide = torch.promote_types(g.dtype, torch.float32)
    if rounded_to is not None:
        return _rounded_factor(gradient.to(wide), inputs.to(wide), g.to(wide), torch.finfo(rounded_to))
    columns = torch.arange(inputs.d_in, dtype=torch.float64, device=g.device)
    v = torch.cos(0.7 * columns * columns + 0.3).to(wide)
    g = g.to(wide)
    xv = inputs.to(wide).along(v)
    gxv = g.t() @ xv[:, 0] if inputs.groups == 1 else (by_group(g.t(), inputs.groups) @ xv.t()[..., None]).flatten()
    seen, expected = (gradient.to(wide) @ v).double(), inputs.total(gxv.double())
    cross, expected2, seen2 = torch.stack([seen @ expected, expected @ expected, seen @ seen]).tolist()
    eps = torch.finfo(wide).eps
    factor = cross / expected2 if expected2 else 0.0
    remainder = max(0.0, 1 - (cross / expected2) * (cross / seen2)) ** 0.5 if expected2 and seen2 else 0.0
    if abs(factor - 1) < 64 * eps and remainder < 1e-4:  # the usual case needs no bound on rounding
        return 1.0, remainder, 0.0
    largest = _norm(g, inputs) * _norm(xv, inputs)
    least = torch.finfo(wide).tiny / eps  # below it rounding is absolute
    if expected2**0.5 <= least or 0 < seen2**0.5 <= least or expected2**0.5 <= 1e3 * eps * largest:
        return None, 0.0, 0.0
    return (1.0 if abs(factor - 1) < 64 * eps else factor), remainder, 30 * eps * largest / expected2**0.5


def _rounded_factor(
    gradient: Tensor, inputs: Inputs, g: Tensor, numbers: torch.finfo
) -> tuple[float | None, float, float]:
    """As `gradient_factor`, for entries that were rounded to these numbers: small ones absolutely."""
    seen, expected = gradient.double().flatten(), inputs.sum(g).double().flatten()
    cross, expected2, seen2 = torch.stack([seen @ expected, expected @ expected, seen @ seen]).tolist()
    largest = _norm(g, inputs) * inputs.squares() ** 0.5
    least = granularity(numbers)
    rounding = least * (gradient.numel() ** 0.5 + (inputs.squares() * g.shape[1]) ** 0.5)
    vanished = 0 < seen2**0.5 <= 4 * rounding
    if vanished or expected2**0.5 <= max(4 * rounding, 1e3 * torch.finfo(g.dtype).eps * largest):
        return None, 0.0, 0.0
    factor = cross / expected2
    remainder = max(0.0, 1 - factor * (cross / seen2)) ** 0.5 if seen2 else 0.0
    tolerance = 4 * (numbers.eps + (rounding / seen2**0.5 if seen2 else 0.0))
    return (1.0 if abs(factor - 1) < numbers.eps else factor), remainder, tolerance


def granularity(numbers: torch.finfo) -> float:
    """The absolute rounding near zero of these numbers where sums of them are taken in float32 at least.

    The step between their subnormals, but no less than what `torch.set_flush_denormal` makes zero.
    """
    wide = torch.promote_types(getattr(torch, numbers.dtype), torch.float32)
    return max(numbers.tiny * numbers.eps, torch.finfo(wide).tiny)


def _norm(t: Tensor, inputs: Inputs) -> float:
    """That of something with a row for each of X's."""
    return float(inputs.total(torch.linalg.vector_norm(t, dtype=torch.float64).square()).sqrt())


def drop_inert_hooks(module: nn.Module) -> None:
    """Remove hooks whose optimizer is gone, such as those that a copied module brought along."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, _ForwardHook) and hook.recorder() is None:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def check_free(layer: Layer) -> None:
    """Raise if a live recorder is attached to the layer.

    Raises:
        RuntimeError: There is one.
    """
    for hook in layer.module._forward_hooks.values():
        recorder = hook.recorder() if isinstance(hook, _ForwardHook) else None
        if recorder is not None and recorder.layer.weight is layer.weight:
            raise RuntimeError(
                f"layer {layer.name!r} is attached to another LocoProp already; two would solve for the same weights. "
                "Call close() on the first one, or use copy.deepcopy(model)"
            )


def _own_node(output: Tensor) -> Tensor:
    """The output as a tensor that is no view of another.

    `nn.Linear` with bias returns a view for inputs that are not 2-D. An in-place activation on a view replaces its
    autograd node, and a hook registered before never fires. Seen through `_unsafe_view`, as torch itself returns it
    without bias, the same memory has a node of its own.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not output.is_contiguous() or not base.requires_grad:
        return output
    return torch.ops.aten._unsafe_view.default(base, output.shape)  # type: ignore[no-any-return]
