"""LocoProp as a `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco import capture, groups
from torchloco.arguments import output_transfer, resolve_loss, resolve_solver, resolve_target
from torchloco.display import describe
from torchloco.discovery import Decision, Discovery
from torchloco.layers import as_rows
from torchloco.losses import Loss, SquaredLoss
from torchloco.problem import LocalProblem
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver
from torchloco.targets import GradientTarget, LayerRows, TargetRule
from torchloco.transfers import Transfer, get_transfer, nearest


@dataclass(frozen=True)
class LayerInfo:
    """What was decided for a layer.

    Args:
        name: Its name in the model.
        shape: (d_out, d_in) of its weight.
        transfer: Its transfer function; None until the first forward pass shows it.
        source: How the transfer was found.
        loss: The local loss.
        target: The rule for the local target.
        solver: The solver.
    """

    name: str
    shape: tuple[int, int]
    transfer: Transfer | None
    source: str
    loss: Loss
    target: TargetRule
    solver: Solver


@dataclass
class _Layer:
    """A supported layer while it is attached."""

    name: str
    weight: Parameter
    bias: Parameter | None
    learn_bias: bool
    inner: Optimizer | None
    recorder: capture.Recorder
    decision: Decision | None

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias] if self.learn_bias and self.bias is not None else [self.weight]


class LocoProp(Optimizer):
    """LocoProp: several cheap local steps per layer for each back-propagation (Amid, Anil, Warmuth 2022).

    One forward and backward pass gives every supported layer its rows X, pre-activations A and G = ∂L/∂A. Each layer
    then minimises its own objective, independently of the others::

        minimise over W̃, b̃:   Σ_rows loss(X W̃ᵀ + b̃ ; T) + regularizer(W̃, W)

    Supported is `nn.Linear` with any number of leading dimensions. All other parameters go to a fallback optimizer.
    `repr(optimizer)` and `optimizer.layers` say what was decided for every layer; transfer functions that are not given
    are discovered in the first forward pass. Build the optimizer before the first forward pass of a compiled model.

    Param groups are torch's, with the options `lr`, `activation_lr` and `local_steps`; what `"params"` lists may also be
    modules or layer names. A group with `"fallback": True` goes to the fallback optimizer, with its options.

    Args:
        model: The network. Its parameters that require a gradient are trained.
        lr: Base learning rate of the local steps, > 0. The paper's is 1e-5, with its RMSProp.
        activation_lr: γ, the activation learning rate that places the targets, > 0. It multiplies G, in which a mean's
            1/N is: doubling the batch halves its effect. Paper: 10.
        local_steps: T, local steps per layer and mini-batch, >= 1. Paper: 10.
        loss: "matching" (LocoProp-M) or "squared" (LocoProp-S), or a `Loss`. A transfer that is not monotone (GELU,
            SiLU, Mish) has no convex matching loss: its layer takes the squared loss instead, and repr says so.
        target: A rule T = target(rows: `LayerRows`); default: the one that goes with the loss, T = f(A) - γG for the
            matching loss, T = A - γG for the squared one.
        regularizer: An object with `gradient(new, old)`, such as `SquaredDistance`; default: none.
        solver: A `Solver`, or a torch.optim class for `FirstOrderSteps` of it; default: `FirstOrderSteps()`, T steps of
            the paper's RMSProp.
        transfers: Transfer functions by layer name, e.g. ``{"decoder.0": "tanh"}``; names or `Transfer` objects.
        output: The transfer that matches the network loss at the model's end: a transfer's name, or the criterion as a
            module, class or functional (BCE with logits ↔ sigmoid, cross-entropy ↔ softmax, MSE ↔ identity).
            Default: identity, where the model does not compute its loss itself.
        fallback: Optimizer of the parameters in no supported layer: a class or factory `(params) → Optimizer`;
            default `torch.optim.AdamW`. Its groups are in `param_groups`, marked `"fallback": True`.
        params: Parameters or groups to restrict to or to split; default: all that require a gradient.

    Raises:
        TypeError: An argument of an unsupported type.
        ValueError: A value outside its range; an unknown loss, transfer or layer; a model without supported layers.
        RuntimeError: Another LocoProp is attached to a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        *,
        activation_lr: float = 10.0,
        local_steps: int = 10,
        loss: str | Loss = "matching",
        target: TargetRule | None = None,
        regularizer: Regularizer | None = None,
        solver: Solver | Callable[..., Optimizer] | None = None,
        transfers: Mapping[str, str | Transfer] | None = None,
        output: Any = None,
        fallback: Callable[..., Optimizer] | None = None,
        params: Iterable[Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument must be the model (an nn.Module), got {type(model).__name__}; "
                "parameters go to params="
            )
        self._loss = resolve_loss(loss)
        self._target = resolve_target(target, self._loss)
        self._solver = resolve_solver(solver)
        if regularizer is not None and not callable(getattr(regularizer, "gradient", None)):
            raise TypeError(f"regularizer must have a method gradient(new, old), got {type(regularizer).__name__}")
        if fallback is not None and (not callable(fallback) or isinstance(fallback, Optimizer)):
            raise TypeError(
                "fallback must be a torch.optim class or a factory (params) → Optimizer, got "
                f"{type(fallback).__name__}; it is given the parameters in no supported layer"
            )
        self._regularizer = regularizer
        self._make_fallback = fallback or torch.optim.AdamW
        self._fallback: Optimizer | None = None
        self._plan = groups.Plan(model, params)
        self._layers: dict[str, _Layer] = {}
        self._given = self._resolve_transfers(transfers or {})
        end = None if output is None else output_transfer(output)
        defaults = {"lr": lr, "activation_lr": activation_lr, "local_steps": local_steps}
        groups.check_options(defaults)
        self._closed = False
        super().__init__(self._plan.groups, defaults)
        self._discovery = Discovery(model, end)
        for handle in self._discovery.handles:
            weakref.finalize(self, handle.remove)

    # --- the algorithm -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One LocoProp update of every layer with a gradient, and one fallback step for the other parameters.

        Args:
            closure: Re-evaluates the model and returns the loss, with `backward()` called; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: A gradient or the result of a local solve is not finite; a gradient has no captured rows, or
                belongs to another pass than they do. No parameter has been changed then.
        """
        if self._closed:
            raise RuntimeError("this LocoProp was closed; build a new one to go on training")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._conclude_discovery()
        problems = [(layer, self._problem(layer)) for layer in self._layers_with_gradient()]
        for layer, problem in problems:
            lrs = [self._group_of[p]["lr"] for p in layer.params]
            self._solver.solve(problem, layer.params, layer.inner, lrs, self._group_of[layer.weight]["local_steps"])
        self._refuse_divergence(problems)
        if self._fallback is not None:
            self._fallback.step()
        self._release()
        return loss

    def _problem(self, layer: _Layer) -> LocalProblem:
        """The layer's local problem at the old weights."""
        group = self._group_of[layer.weight]
        rows = self._rows(layer, group["activation_lr"])
        loss, target = self._objective(rows.transfer)
        params = layer.params
        old = [p.detach().clone() for p in params]
        frozen = None if layer.bias is None else layer.bias.detach()
        return LocalProblem(
            rows=rows,
            loss=loss,
            target=target,
            regularizer=self._regularizer,
            weight=old[0],
            bias=old[1] if len(old) > 1 else frozen,
            learn_bias=len(old) > 1,
            gradients=[p.grad for p in params if p.grad is not None],
        )

    def _rows(self, layer: _Layer, activation_lr: float) -> LayerRows:
        """X, A and G of all recorded calls, in the weight's dtype, agreeing with the weight's `.grad`."""
        weight, bias = layer.weight, layer.bias
        xs, activations, gs = [], [], []
        for call in layer.recorder.captures:
            if call.input_changed:
                raise RuntimeError(
                    f"the input of layer {layer.name!r} was overwritten between its forward pass and step(); "
                    "pass a copy, or call step() before writing to it"
                )
            if call.x.device != weight.device:
                raise RuntimeError(
                    f"layer {layer.name!r}: its input was on {call.x.device}, its weight is on {weight.device}; "
                    "move the model before the forward pass, not after"
                )
            x = as_rows(call.x).to(weight.dtype)
            stale = call.output_changed or call.a.dtype != weight.dtype
            a = torch.nn.functional.linear(x, weight, bias) if stale else as_rows(call.a)
            xs.append(x)
            activations.append(a)
            gs.append(as_rows(call.g).to(weight.dtype))
        x, a, g = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (xs, activations, gs))
        assert layer.weight.grad is not None and layer.decision is not None
        factor, remainder = capture.gradient_factor(layer.weight.grad, x, g)
        if remainder > 0.05:
            raise RuntimeError(
                f"layer {layer.name!r}: its gradient does not belong to the captured rows (relative difference "
                f"{remainder:.2g}). Supported: gradients of the passes since the last step() or zero_grad() of this "
                "optimizer, scaled or clipped by norm. Call optimizer.zero_grad() before each backward pass, and do not "
                "clip by value or edit .grad otherwise"
            )
        if factor != 1:
            g = g * factor
        return LayerRows(layer.name, x, a, g, layer.decision.transfer, float(activation_lr))

    def _objective(self, transfer: Transfer | None) -> tuple[Loss, TargetRule]:
        """The loss and target of a layer with this transfer; the squared ones where the loss does not suit it."""
        if transfer is None or self._loss.suits(transfer):
            return self._loss, self._target
        return SquaredLoss(), GradientTarget()

    # --- checks before and after ---------------------------------------------------------------------------------

    def _layers_with_gradient(self) -> list[_Layer]:
        """The layers to solve, after every check that does not need their rows."""
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        self._refuse_non_finite()
        layers = [layer for layer in self._layers.values() if layer.weight.grad is not None]
        halves = [
            layer.name
            for layer in self._layers.values()
            if layer.weight.grad is None and layer.learn_bias and layer.bias is not None and layer.bias.grad is not None
        ]
        if halves:
            raise RuntimeError(
                f"the bias of {', '.join(halves)} has a gradient, the weight has none; freeze both, or freeze the weight "
                "before building LocoProp, so that the bias goes to the fallback optimizer"
            )
        missing = [layer.name for layer in layers if not layer.recorder.captures]
        if missing:
            raise RuntimeError(
                f"layers with a gradient but no captured rows: {', '.join(missing)}. The optimizer must be built before "
                "the forward pass (and before the first call of a compiled model), the layers called as modules, and "
                "zero_grad() not called between backward() and step(). A layer that cannot be captured can be given to "
                "the fallback optimizer by a param group with 'fallback': True"
            )
        for layer in layers:
            if layer.bias is not None and layer.learn_bias != (layer.bias.grad is not None and self._holds(layer.bias)):
                layer.learn_bias = not layer.learn_bias
                layer.inner = self._attach_inner(layer.params)
        return layers

    def _refuse_non_finite(self) -> None:
        named = [(self._plan.names[p], p.grad) for p in self._group_of if p.grad is not None and not p.grad.is_sparse]
        if not named:
            return
        norms = torch.stack([n.to(named[0][1].device) for n in torch._foreach_norm([g for _, g in named], float("inf"))])
        bad = [name for (name, _), finite in zip(named, norms.isfinite().tolist(), strict=True) if not finite]
        if bad:
            self._release()
            raise RuntimeError(
                f"the gradient of {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''} is not finite; nothing was updated. "
                "Look for a non-finite loss or input in this mini-batch, or lower the learning rate"
            )

    def _refuse_divergence(self, problems: list[tuple[_Layer, LocalProblem]]) -> None:
        params = [p for layer, _ in problems for p in layer.params]
        if not params:
            return
        norms = torch._foreach_norm([p.detach() for p in params], float("inf"))
        if all(torch.stack([n.to(norms[0].device) for n in norms]).isfinite().tolist()):
            return
        bad = [layer for layer, _ in problems if not all(bool(p.isfinite().all()) for p in layer.params)]
        for layer, problem in problems:
            for p, old in zip(layer.params, [problem.weight, problem.bias], strict=False):
                assert old is not None
                p.copy_(old)
        for layer in bad:
            for p in layer.params:
                self.state.pop(p, None)
        self._bind()
        self._release()
        raise RuntimeError(
            f"the local steps of {', '.join(layer.name for layer in bad)} diverged; all weights are as before the step, "
            "and these layers' inner state starts anew. Lower lr or activation_lr"
        )

    # --- torch.optim.Optimizer -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, modules or layer names; layers found in it are attached.

        Raises:
            TypeError, ValueError: As for the constructor; nothing has been changed then.
            RuntimeError: Another LocoProp is attached to a layer.
        """
        split = self._plan.split(param_group)
        for name, module in split.layers:
            capture.check_free(name, module)
        self._check_new(split)
        if split.params:
            super().add_param_group({**split.options, "params": split.params})
        if split.fallback:
            self._add_fallback_group({**split.fallback_options, "params": split.fallback})
        for name, module in split.layers:
            self._attach(name, module)
        for layer in self._layers.values():
            if layer.bias is not None and not layer.learn_bias and any(layer.bias is p for p in split.params):
                layer.learn_bias = True
                layer.inner = self._attach_inner(layer.params)
        self._bind()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`, and the rows captured with them."""
        super().zero_grad(set_to_none)
        self._conclude_discovery()
        self._release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the given one is copied, so that it can be loaded again."""
        super().load_state_dict(copy.deepcopy(state_dict))
        self._bind()

    def close(self) -> None:
        """Take the hooks off the model. The optimizer takes no further step; another can be attached."""
        for layer in self._layers.values():
            layer.recorder.handle.remove()
        for handle in self._discovery.handles:
            handle.remove()
        self._release()
        self._layers = {}
        self._closed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> LocoProp:
        raise TypeError(
            "a LocoProp is bound to its model and cannot be copied; copy the model, build a new LocoProp on it and "
            "load_state_dict(optimizer.state_dict())"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a LocoProp is bound to its model and cannot be pickled; save optimizer.state_dict() and load it into a new "
            "LocoProp built on the model"
        )

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[LayerInfo]:
        """What was decided for each layer, in the model's order."""
        infos = []
        for layer in self._layers.values():
            transfer = layer.decision.transfer if layer.decision else None
            source = layer.decision.source if layer.decision else "not known before the first forward pass"
            loss, target = self._objective(transfer)
            d_out, d_in = layer.weight.shape
            infos.append(LayerInfo(layer.name, (d_out, d_in), transfer, source, loss, target, self._solver))
        return infos

    @property
    def solver(self) -> Solver:
        """The solver of the local problems."""
        return self._solver

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer of the local problems, None for none."""
        return self._regularizer

    @property
    def fallback_name(self) -> str:
        """The fallback optimizer's class and learning rates, or "none"."""
        if self._fallback is None:
            return "none"
        rates = sorted({f"{group['lr']:g}" for group in self._fallback.param_groups})
        return f"{type(self._fallback).__name__}(lr={', '.join(rates)})"

    @property
    def fallback_parameters(self) -> list[str]:
        """Names of the parameters that the fallback optimizer updates."""
        return [self._plan.names[p] for g in self.param_groups if g.get("fallback") for p in g["params"]]

    def _resolve_transfers(self, given: Mapping[str, str | Transfer]) -> dict[str, Decision]:
        known = list(self._plan.layers)
        for name in given:
            if name not in known:
                raise ValueError(
                    f"transfers names the layer {name!r}, which is no supported layer of this model"
                    f"{nearest(name, known)}; supported layers: {', '.join(known)}"
                )
        return {name: Decision(get_transfer(transfer), "transfers=") for name, transfer in given.items()}

    def _attach(self, name: str, module: nn.Module) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Parameter) and (bias is None or isinstance(bias, Parameter))
        learn_bias = bias is not None and self._holds(bias)
        params = [weight, bias] if learn_bias and bias is not None else [weight]
        recorder = capture.Recorder(name, module, weakref.WeakMethod(self._observe))
        weakref.finalize(self, recorder.handle.remove)
        self._layers[name] = _Layer(
            name, weight, bias, learn_bias, self._attach_inner(params), recorder, self._given.get(name)
        )

    def _attach_inner(self, params: list[Parameter]) -> Optimizer | None:
        inner = self._solver.attach(params, self.defaults["lr"])
        if inner is not None:
            for p in params:
                inner.state[p] = self.state[p].setdefault("solver", {})
        return inner

    def _check_new(self, split: groups.Split) -> None:
        taken = {p: group for group in self.param_groups for p in group["params"]}
        for p in [*split.params, *split.fallback]:
            if p in taken:
                raise ValueError(f"parameter {self._plan.names[p]!r} is in another param group already")
        new = {**self.defaults, **split.options}
        groups_of: dict[str, dict[str, Any]] = {}
        for p, group in [*taken.items(), *((p, new) for p in split.params)]:
            if group.get("fallback"):
                continue
            name = self._plan.layer_of(p)
            other = groups_of.setdefault(name, group)
            for option in ("activation_lr", "local_steps"):
                if group[option] != other[option]:
                    raise ValueError(
                        f"layer {name!r}: weight and bias are one problem, but their param groups say {option} "
                        f"{other[option]:g} and {group[option]:g}; give both groups the same (lr may differ)"
                    )

    def _holds(self, p: Parameter) -> bool:
        return any(p is q for group in self.param_groups if not group.get("fallback") for q in group["params"])

    def _add_fallback_group(self, group: dict[str, Any]) -> None:
        if self._fallback is None:
            self._fallback = self._make_fallback([group])
            if not isinstance(self._fallback, Optimizer):
                raise TypeError(f"fallback returned {type(self._fallback).__name__}, not a torch.optim.Optimizer")
        else:
            self._fallback.add_param_group(group)
        self._fallback.param_groups[-1]["fallback"] = True
        self.param_groups.append(self._fallback.param_groups[-1])

    def _bind(self) -> None:
        """Let the inner optimizers and the fallback work on this optimizer's state and groups.

        So `state_dict` holds everything, keyed by parameter, and schedulers reach every group.
        """
        for layer in self._layers.values():
            if layer.inner is not None:
                for p in layer.params:
                    layer.inner.state[p] = self.state[p].setdefault("solver", {})
        if self._fallback is not None:
            self._fallback.state = self.state
            self._fallback.param_groups = [group for group in self.param_groups if group.get("fallback")]

    def _conclude_discovery(self) -> None:
        for name, decision in self._discovery.conclude().items():
            layer = self._layers[name]
            layer.decision = layer.decision or decision

    def _observe(self, recorder: capture.Recorder, x: Tensor, output: Tensor) -> None:
        self._discovery.enter(x)
        if self._layers[recorder.name].decision is None:
            self._discovery.follow(recorder.name, output)

    def _release(self) -> None:
        for layer in self._layers.values():
            layer.recorder.captures.clear()

    def __repr__(self) -> str:
        return describe(self)
