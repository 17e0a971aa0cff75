"""RMSProp in the arithmetic of TensorFlow 1, which the authors' experiments use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchloco.checks import check_range


class RMSProp(Optimizer):
    """RMSProp as TensorFlow 1 computes it; usable with any model, as an ordinary torch optimizer.

    For each parameter w with gradient g::

        v ← decay · v + (1 - decay) · g²            v starts at ones
        m ← momentum · m + lr · g / √(v + epsilon)
        w ← w - m

    `torch.optim.RMSprop` differs in three places: its v starts at zero, its epsilon is outside the root, and its
    lr multiplies the momentum afterwards, so a changed lr also rescales the steps that are already under way. This last
    difference goes away with ``lr_outside=True``::

        m ← momentum · m + g / √(v + epsilon)
        w ← w - lr · m

    With a constant lr both are the same. Under a schedule towards 0, steps under way with lr inside go on for about
    1 / (1 - momentum) steps at the rates at which they began; with lr outside they end with the schedule.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        decay: Decay of the mean square v, in [0, 1).
        momentum: Decay of the momentum m, in [0, 1). At 0 no momentum slot is kept.
        epsilon: Added to v inside the root, > 0; its unit is that of a squared gradient.
        lr_outside: Whether lr multiplies the momentum when it is applied, and not the gradients that enter it.

    v and m have the parameter's dtype. In bfloat16 they do not decay where momentum or decay is above 0.996 or so, as
    the change is lost in rounding.

    Groups have a `"weight"` as well, at first 1, by which the gradients of a step are multiplied once they are
    normalized, inside the momentum in any case: for schedules that are to leave the steps under way as they are.

    Raises:
        TypeError: An option is not a number, or `lr_outside` no bool.
        ValueError: An option is outside its range.
        RuntimeError: A gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        decay: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-10,
        lr_outside: bool = False,
    ) -> None:
        options = {"lr": lr, "decay": decay, "momentum": momentum, "epsilon": epsilon, "lr_outside": lr_outside}
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, also one of before there was `lr_outside`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr_outside", False)
            group.setdefault("weight", 1.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options; see `torch.optim.Optimizer.add_param_group`."""
        options = {**self.defaults, **param_group}
        check_range("lr", options["lr"], 0, inclusive=True)
        check_range("decay", options["decay"], 0, 1, inclusive=True)
        check_range("momentum", options["momentum"], 0, 1, inclusive=True)
        check_range("epsilon", options["epsilon"], 0)
        if not isinstance(options["lr_outside"], bool):
            raise TypeError(f"lr_outside must be True or False, got {options['lr_outside']!r}")
        super().add_param_group({"weight": 1.0, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.is_sparse:
            raise RuntimeError("RMSProp does not support sparse gradients; use a dense embedding (sparse=False)")
        tensors = [p, g, *self.averages(p, group["momentum"] != 0)]
        for block in _blocks(tensors):
            _arithmetic(*block, lr=float(group["lr"]), group=group)

    def averages(self, p: Tensor, momentum: bool = True) -> list[Tensor]:
        """What is kept of a parameter between steps: v, and m where there is momentum; not copies."""
        state = self.state[p]
        if "mean_square" not in state:
            state["mean_square"] = torch.ones_like(p, memory_format=torch.preserve_format)
        if momentum and "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [state["mean_square"], *([state["momentum"]] if momentum else [])]


def _arithmetic(p: Tensor, g: Tensor, v: Tensor, m: Tensor | None = None, *, lr: float, group: dict[str, Any]) -> None:
    v.mul_(group["decay"]).addcmul_(g, g, value=1 - group["decay"])
    inverse_root = torch.add(v, group["epsilon"], out=_scratch(v)).rsqrt_()  # cheaper than a root and a division
    weight = group["weight"]
    if m is None:
        p.addcmul_(g, inverse_root, value=-lr * weight)
    elif group["lr_outside"]:
        p.sub_(m.mul_(group["momentum"]).addcmul_(g, inverse_root, value=weight), alpha=lr)
    else:
        p.sub_(m.mul_(group["momentum"]).addcmul_(g, inverse_root, value=lr * weight))


_BLOCK = 1 << 20
_SMALL = 1 << 14
_local = threading.local()


def _scratch(like: Tensor) -> Tensor:
    """Memory for a block, kept by each thread: fresh memory costs a page fault every few kilobytes."""
    if like.numel() <= _SMALL or like.device.type != "cpu" or like.numel() > _BLOCK or not like.is_contiguous():
        return torch.empty_like(like)
    kept: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("scratch", {})
    if like.dtype not in kept or kept[like.dtype].numel() < like.numel():
        kept[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
    return kept[like.dtype][: like.numel()].view(like.shape)


def _blocks(tensors: list[Tensor]) -> Iterable[Sequence[Tensor]]:
    """The tensors in blocks small enough to stay in a CPU's cache over the passes of the update."""
    p = tensors[0]
    if p.device.type != "cpu" or p.numel() <= _BLOCK or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(torch.split(t.view(-1), _BLOCK) for t in tensors), strict=True)
