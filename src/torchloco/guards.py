"""Checks around a step: what is refused before anything is changed, and how a failed step is undone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from torchloco.attached import AttachedLayer


def non_finite(named: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold a NaN or an infinity, at the price of one sum of each where none does."""
    if not named:
        return []
    device = next(iter(named.values())).device
    sums = torch.stack([t.sum().to(device, torch.float32) for t in named.values()])
    if sums.sum().isfinite():
        return []
    return [name for name, t in named.items() if not t.isfinite().all()]  # sums of finite entries may overflow too


def refuse_non_finite(gradients: Mapping[str, Tensor]) -> None:
    """Raise if a gradient is not finite.

    Raises:
        RuntimeError: Names the parameters.
    """
    bad = non_finite({name: g.coalesce().values() if g.is_sparse else g for name, g in gradients.items()})
    if bad:
        raise RuntimeError(
            f"the gradient of {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''} is not finite; nothing was updated. "
            "Look for a non-finite loss or input in this mini-batch, or lower the learning rate"
        )


def layers_to_solve(layers: list[AttachedLayer]) -> list[AttachedLayer]:
    """The layers whose weight has a gradient.

    Raises:
        RuntimeError: One has no captured rows, or only its bias has a gradient.
    """
    replaced = [layer.name for layer in layers if layer.recorder.layer.weight is not layer.weight]
    if replaced:
        raise RuntimeError(
            f"the weight of {', '.join(replaced)} was replaced after LocoProp was built (by an assignment, a "
            "parametrization or load_state_dict(assign=True)); build LocoProp afterwards"
        )
    halves = [
        layer.name
        for layer in layers
        if layer.weight.grad is None and layer.learn_bias and layer.bias is not None and layer.bias.grad is not None
    ]
    if halves:
        raise RuntimeError(
            f"the bias of {', '.join(halves)} has a gradient, the weight has none; freeze both, or freeze the weight "
            "before building LocoProp, so that the bias goes to the fallback optimizer"
        )
    ready = [layer for layer in layers if layer.weight.grad is not None]
    # zero_grad(set_to_none=False) leaves zeros at a layer that took no part in this pass.
    ready = [layer for layer in ready if layer.recorder.collected() or is_nonzero(layer.weight.grad)]
    missing = [layer.name for layer in ready if not layer.recorder.collected()]
    if missing:
        raise RuntimeError(
            f"layers with a gradient but no captured rows: {', '.join(missing)}. The optimizer must be built before "
            "the forward pass, and before the first call of a model compiled by torch.compile (torch._dynamo.reset() "
            "allows that), the layers called as modules, and neither zero_grad() nor step() called between "
            "backward() and step(); under DistributedDataParallel on all ranks or on none. nn.MultiheadAttention is "
            "not captured under activation checkpointing, nor in code that torch.compile has compiled "
            "(torch.compiler.disable keeps a module out of it). A layer that cannot be captured can be given to the "
            "fallback optimizer by a param group with 'fallback': True"
        )
    return ready


def is_nonzero(gradient: Tensor | None) -> bool:
    """Whether there is a gradient, not of zeros alone."""
    return gradient is not None and bool(gradient.any())


class Unfrozen:
    """Warns, once each, of parameters that are in no group, as they were frozen then, and have a gradient now.

    Args:
        expected: Whether the user has chosen what to train, so that nothing is to be said.
    """

    def __init__(self, *, expected: bool) -> None:
        self._expected = expected
        self._said: set[Parameter] = set()

    def warn(self, others: Mapping[Parameter, str]) -> None:
        """Look at the parameters that are in no group, with their names."""
        new = {p: name for p, name in others.items() if p.grad is not None and p not in self._said}
        if self._expected or not new:
            return
        self._said |= new.keys()
        names = list(new.values())
        warnings.warn(
            f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''} were frozen or not there when LocoProp was built, "
            "have a gradient now and are not trained; add_param_group({'params': [...]}) takes them in",
            stacklevel=6,
        )


class Originals(dict[Parameter, Tensor]):
    """Copies of parameters before they are solved for, made one layer at a time, when others' rows are freed already.

    As a context: whatever goes wrong inside, the copies are written back.
    """

    def keep(self, params: list[Parameter]) -> None:
        """Copy these, which are about to be changed."""
        self.update({p: p.detach().clone() for p in params})

    def __enter__(self) -> Originals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is not None:
            for p, value in self.items():
                p.copy_(value)
