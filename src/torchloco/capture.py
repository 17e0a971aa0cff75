"""All contact with hooks: they record what enters and leaves a layer, and the gradient that comes back.

A forward hook keeps the layer's input and output of one call; a hook on the output tensor commits them when the
backward pass brings their gradient. So forward and backward are paired by closure: calls in eval mode or without
gradients leave nothing behind, a layer may be called several times, and recomputed calls are recorded once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Observer = Callable[["Recorder", Tensor, Tensor], None]
"""Told of each recorded forward call: (recorder, input, output)."""


@dataclass(frozen=True)
class Capture:
    """One call of a layer: its input, its output, and the gradient at the output, with any leading dimensions."""

    x: Tensor
    a: Tensor
    g: Tensor
    versions: tuple[int, int]

    @property
    def input_changed(self) -> bool:
        """Whether the input was written to after the forward pass."""
        return self.x._version != self.versions[0]

    @property
    def output_changed(self) -> bool:
        """Whether the output was written to after the forward pass, as an in-place activation does."""
        return self.a._version != self.versions[1]


class Recorder:
    """The captures of one layer since the last step.

    Args:
        name: The layer's name.
        module: The layer.
        observer: Weak reference to a callable (recorder, input, output), called at each recorded forward call.

    Raises:
        RuntimeError: Another live recorder is attached to the layer.
    """

    def __init__(self, name: str, module: nn.Module, observer: weakref.WeakMethod[Observer]) -> None:
        check_free(name, module)
        self.name = name
        self.module = module
        self.captures: list[Capture] = []
        self._observer = observer
        self.handle = module.register_forward_hook(_ForwardHook(self), with_kwargs=True)

    def record(self, x: Tensor, output: Tensor) -> Tensor:
        """Watch one call. Returns the output to use from here on."""
        output = _own_node(output)
        observe = self._observer()
        if observe is not None:
            observe(self, x, output)
        x, a = x.detach(), output.detach()
        versions = (x._version, a._version)
        owner = weakref.ref(self)

        def commit(g: Tensor) -> None:
            recorder = owner()
            if recorder is not None:
                recorder.captures.append(Capture(x, a, g.detach(), versions))

        output.register_hook(commit)  # type: ignore[no-untyped-call]
        return output


class _ForwardHook:
    """Holds its recorder weakly; copies, as `deepcopy(model)` or `torch.save(model)` make them, are inert."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = (lambda: None) if recorder is None else weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        recorder = self.recorder()
        if recorder is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        if not module.weight.requires_grad:  # frozen: nothing to solve for
            return None
        return recorder.record(args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return (_ForwardHook, ())


def gradient_factor(gradient: Tensor, x: Tensor, g: Tensor) -> tuple[float | None, float, float]:
    """The s with gradient ≈ s · GᵀX, and how far off it is relative to the gradient.

    A gradient scaler or norm clipping multiplies `.grad` but not the captured G; s makes them agree again. A large
    remainder says that they belong to different passes. Both are taken along one fixed dense direction v, which costs
    three matrix-vector products instead of a matrix product. Where GᵀX is only rounding error, s cannot be told: None.

    Args:
        gradient: The weight's `.grad`, (d_out, d_in).
        x: X, (N, d_in).
        g: G, (N, d_out).

    Returns:
        s or None, the remainder, and how large rounding may make that.
    """
    columns = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    v = torch.cos(0.7 * columns * columns + 0.3).to(x.dtype)
    xv = x @ v
    seen, expected = (gradient @ v).double(), (g.t() @ xv).double()
    products = [seen @ expected, expected @ expected, seen @ seen, g.norm().double() * xv.norm().double()]
    cross, expected2, seen2, largest = torch.stack(products).tolist()
    eps = torch.finfo(x.dtype).eps
    if expected2**0.5 <= 1e3 * eps * largest:
        return None, 0.0, 0.0
    factor = cross / expected2
    remainder = max(0.0, 1 - cross**2 / (expected2 * seen2)) ** 0.5 if seen2 else 0.0
    return (1.0 if abs(factor - 1) < 64 * eps else factor), remainder, 30 * eps * largest / expected2**0.5


def check_free(name: str, module: nn.Module) -> None:
    """Raise if a live recorder is attached to the module.

    Raises:
        RuntimeError: There is one.
    """
    for hook in module._forward_hooks.values():
        if isinstance(hook, _ForwardHook) and hook.recorder() is not None:
            raise RuntimeError(
                f"layer {name!r} is attached to another LocoProp already; two would solve for the same weights. "
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
