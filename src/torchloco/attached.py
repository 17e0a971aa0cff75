"""A layer while LocoProp is attached to it: its state, and how its captured calls become the rows of its problem."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.capture import Capture, Recorder, gradient_factor, granularity
from torchloco.distributed import Peers, one_of
from torchloco.inputs import Dense, Inputs
from torchloco.layers.base import Piece
from torchloco.outer import OuterRule
from torchloco.problem import Size
from torchloco.solvers import Solver
from torchloco.state import schedule_factor
from torchloco.targets import LayerRows
from torchloco.transfers import Transfer

Groups = Mapping[Parameter, dict[str, Any]]
"""The param group of each parameter."""


@dataclass
class AttachedLayer:
    """A supported layer that an optimizer solves for.

    Args:
        name: Its name in the model.
        weight: In the module's own shape.
        bias: (d_out,), or None.
        learn_bias: Whether the bias takes part in the local problem.
        recorder: Its captured calls.
        inner: The optimizer of the local steps, if the solver has one.
        outers: The optimizers of the outer rule, if it has some.
        memory: What target and solver keep from one mini-batch to the next, by "target" and "solver".
        rows: The matrix problem of the step under way.
        size: Of the last problem that was solved.
    """

    name: str
    weight: Parameter
    bias: Parameter | None
    learn_bias: bool
    recorder: Recorder
    inner: Optimizer | None = None
    outers: list[Optimizer] = field(default_factory=list)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: LayerRows | None = None
    size: Size | None = None

    @property
    def params(self) -> list[Parameter]:
        """What is solved for: the weight, and the bias if it is learnt."""
        return [self.weight, self.bias] if self.learn_bias and self.bias is not None else [self.weight]

    def make_optimizers(self, solver: Solver, outer: OuterRule | None, lr: float) -> None:
        """Make the optimizers of the solver and the outer rule; their state is not bound yet."""
        self.inner = solver.attach(self.params, lr)
        self.outers = [] if outer is None else outer.attach(self.params)

    def bind(self, state: MutableMapping[Any, Any], *, fresh: bool = False) -> None:
        """Let the optimizers and the memory live in `state`, by parameter, so that it holds everything.

        Args:
            state: The state of LocoProp.
            fresh: Whether the optimizers were just made, and what they hold is to be kept.
        """
        for part, made in self._optimizers():
            for p in [p for group in made.param_groups for p in group["params"]]:
                kept = state[p].setdefault(part, {})
                if fresh and not kept:
                    kept.update(made.state[p])
                made.state[p] = kept
        self.memory = state.get(self.weight, {}).get("memory", {})

    def forget(self) -> None:
        """Let the optimizers' state of this layer start anew."""
        for _, made in self._optimizers():
            for p in self.params:
                made.state.pop(p, None)

    def detach(self, state: MutableMapping[Any, Any]) -> None:
        """Take the hooks off, and everything of this layer out of `state`."""
        self.recorder.remove()
        self.release()
        for p in self.params:
            for part in ("solver", "outer", "memory"):
                state.get(p, {}).pop(part, None)

    def _optimizers(self) -> list[tuple[str, Optimizer]]:
        """The optimizers, with the name that their state goes by."""
        inner = [] if self.inner is None else [("solver", self.inner)]
        return inner + [("outer", outer) for outer in self.outers]

    def remember(self, state: MutableMapping[Any, Any], part: str, keep: dict[str, Any]) -> None:
        """Take over what a target or solver wants to find in its memory next time."""
        if keep:
            self.memory[part] = {**self.memory.get(part, {}), **keep}
            state[self.weight]["memory"] = self.memory

    def release(self) -> None:
        """Let go of the captured calls and the rows made of them."""
        self.recorder.clear()
        self.rows = None

    def collect(self, transfer: Transfer, activation_lr: float, lr_factor: float) -> None:
        """Make `rows` from all captured calls, in the weight's dtype.

        Args:
            transfer: The layer's transfer function.
            activation_lr: γ.
            lr_factor: What a scheduler has made of lr.

        Raises:
            RuntimeError: The input was overwritten or is on another device.
        """
        x, a, g = self.recorder.layer.join([self._piece(capture) for capture in self.recorder.collected()])
        memory = self.memory.get("target", {})
        self.rows = LayerRows(self.name, x, a, g, transfer, activation_lr, memory, lr_factor=lr_factor)

    def displace(self, rule: OuterRule, old: Mapping[Parameter, Tensor], group_of: Groups) -> None:
        """Let the outer rule make a displacement of the solved weights.

        Args:
            rule: It.
            old: The parameters as they were before the solve.
            group_of: The param group of each parameter.
        """
        rule.apply(self.params, [old[p] for p in self.params], self.outers, schedule_factor(group_of[self.weight]))

    def terms(self, group_of: Groups) -> str:
        """What its problem depends on beside the rows, for comparison with other processes.

        Args:
            group_of: The param group of each parameter.
        """
        assert self.rows is not None
        lrs = " and ".join(str(lr) for lr in dict.fromkeys(float(group_of[p]["lr"]) for p in self.params))
        return (
            f"layer {self.name!r}, {len(self.params)} parameter(s), {self.rows.transfer.name}, lr {lrs}, "
            f"activation_lr {self.rows.activation_lr}, local_steps {group_of[self.weight]['local_steps']}, "
            f"inputs in {self.rows.inputs.groups} group(s), {str(self._coarsest()[0]).removeprefix('torch.')}"
        )

    def _coarsest(self) -> tuple[torch.dtype, bool]:
        """The dtype that rounded most of what was captured, and whether it is the only one."""
        tensors = [t for c in self.recorder.collected() for t in (c.call.x, c.call.a, c.g) if t is not None]
        dtypes = {t.dtype for t in tensors if t.is_floating_point()} | {self.weight.dtype}  # indices round nothing
        return max(dtypes, key=lambda dtype: (torch.finfo(dtype).eps, str(dtype))), len(dtypes) == 1

    def factor(self) -> float | None:
        """What the G of `rows` must be multiplied by to agree with the weight's `.grad`; None where it cannot be told.

        Raises:
            RuntimeError: `.grad` belongs to another pass.
        """
        assert self.weight.grad is not None
        assert self.rows is not None
        x, g = self.rows.inputs, self.rows.g
        coarsest, only = self._coarsest()
        exact = coarsest in (torch.float32, torch.float64) and only
        rounded_to = None if torch.finfo(coarsest).eps <= torch.finfo(torch.float32).eps else coarsest
        factor, remainder, tolerance = gradient_factor(x.matrix(self.weight.grad), x, g, rounded_to=rounded_to)
        tolerance = max(tolerance, 0.003 if exact else 0.05)
        if remainder <= tolerance and self.learn_bias:
            remainder = self._bias_remainder(x, g, 1.0 if factor is None else factor, torch.finfo(coarsest))
        if remainder > tolerance:
            averaged = "the mean over the ranks (wrap the whole model in one DistributedDataParallel), " * x.shared
            raise RuntimeError(
                f"layer {self.name!r}: its gradient does not belong to the captured rows (relative difference "
                f"{remainder:.2g}). Supported: gradients of the passes since the last step() or zero_grad() of this "
                f"optimizer, {averaged}all scaled or clipped by norm together. Call optimizer.zero_grad() before each "
                "backward pass; do not clip by value or edit .grad; give weight penalties as "
                "regularizer=WeightDecay(...), not in the loss, and a layer whose weight is used elsewhere to the "
                "fallback ('fallback': True in its param group)"
            )
        return factor

    def _bias_remainder(self, inputs: Inputs, g: Tensor, factor: float, numbers: torch.finfo) -> float:
        """How far the bias's `.grad` is off factor · Σ_rows G, relative to what rounding to `numbers` cannot touch."""
        assert self.bias is not None
        assert self.bias.grad is not None
        wide = torch.promote_types(g.dtype, torch.float32)
        expected = inputs.total(g.to(wide).sum(0)).mul_(factor)
        difference = (self.bias.grad.to(wide) - expected).norm()
        absolute = 4 * granularity(numbers) * (inputs.all_rows * g.shape[1]) ** 0.5  # of numbers near zero
        if float(difference) <= max(absolute, 1e-4 * float(expected.norm())):  # the usual case
            return 0.0
        rows_norm = inputs.total(g.to(wide).square().sum()).sqrt()
        scale = torch.maximum(expected.norm(), 0.01 * abs(factor) * rows_norm)
        return 0.0 if not float(difference) else float(difference / scale)

    def _piece(self, capture: Capture) -> Piece:
        """One call as rows, in the weight's dtype."""
        call, layer = capture.call, self.recorder.layer
        if call.weights != self.recorder.weights_now() or layer.weight is not self.weight:
            raise RuntimeError(
                f"the weight or bias of layer {self.name!r} was changed or replaced between forward pass and step(); "
                "step right after the backward pass, and build LocoProp after replacing parameters"
            )
        if call.input_changed:
            raise RuntimeError(
                f"the input of layer {self.name!r} was overwritten between its forward pass and step(); "
                "pass a copy, or call step() before writing to it (compiled code may do so too)"
            )
        if call.x.device != self.weight.device:
            raise RuntimeError(
                f"layer {self.name!r}: its input was on {call.x.device}, its weight is on {self.weight.device}; "
                "move the model before the forward pass, not after"
            )
        dtype = self.weight.dtype
        x = layer.inputs(call.x.to(dtype) if call.x.is_floating_point() else call.x, call.a)
        # An in-place activation has overwritten the pre-activations; lower precision has rounded them.
        if call.a is None or call.output_changed or call.a.dtype != dtype:
            bias = None if self.bias is None else self.bias[call.units]
            a = x.to(dtype).apply(x.matrix(self.weight)[call.units], bias)
        else:
            a = layer.rows(call.a)
        g = layer.rows(capture.g).to(dtype)
        if not (x.n == len(a) == len(g)):
            raise RuntimeError(
                f"layer {self.name!r}: {type(layer).__name__} made {x.n} rows of its input and {len(a)} of its output; "
                "its inputs() and rows() must agree"
            )
        if isinstance(x, Dense) and (kept := _with_gradient(g)) is not None:
            x, a, g = x.having(x.x[kept]), a[kept], g[kept]
        return Piece(x, a, g, call.units)


def peers_of(layers: Sequence[AttachedLayer]) -> Peers:
    """Who shares the batch of the captured calls; of the last pass where there are none.

    Raises:
        RuntimeError: Several process groups do.
    """
    captured = [capture.call.peers for layer in layers for capture in layer.recorder.collected()]
    return one_of(captured or [layer.recorder.peers for layer in layers])


def share_calls(layers: Sequence[AttachedLayer], peers: Peers, device: torch.device) -> None:
    """Let a layer that was called in one process count as called in all."""
    called = peers.any([layer.recorder.called for layer in layers], device)
    for layer, flag in zip(layers, called, strict=True):
        layer.recorder.called = flag


def match_gradients(layers: list[AttachedLayer]) -> None:
    """Let the captured G have the factors that scalers and norm clipping have given the gradients.

    They have one for all layers: where one cannot be told, another's is taken.

    Raises:
        RuntimeError: A gradient belongs to another pass.
    """
    factors = [layer.factor() for layer in layers]
    usual = next((factor for factor in factors if factor is not None), 1.0)
    for layer, factor in zip(layers, factors, strict=True):
        factor = usual if factor is None else factor
        if factor != 1 and layer.rows is not None:
            layer.rows.g = layer.rows.g * factor


def _with_gradient(g: Tensor) -> Tensor | None:
    """Which rows of G have a gradient; None if all have one.

    The network's loss does not depend on the others, as on padding: they are to have no say in the further local steps
    either.
    """
    # No single column tells: a ReLU leaves zeros in each. Nor does a plain sum, which is zero for a softmax.
    weights = torch.linspace(1, 2, g.shape[1], dtype=g.dtype, device=g.device)
    candidates = (g @ weights == 0).nonzero()[:, 0]  # mostly none, and then this is all that it costs
    idle = candidates[(g[candidates] == 0).all(1)]
    if not len(idle):
        return None
    kept = torch.ones(len(g), dtype=torch.bool, device=g.device)
    kept[idle] = False
    return kept
