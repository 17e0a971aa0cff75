"""LocoProp as a `torch.optim.Optimizer`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco import capture, groups
from torchloco.arguments import output_transfer, resolve_objective, resolve_solver
from torchloco.attached import AttachedLayer, match_gradients, peers_of, share_calls
from torchloco.discovery import Discovery
from torchloco.display import LayerInfo, describe
from torchloco.distributed import unwrapped
from torchloco.fallback import Fallback
from torchloco.guards import Originals, Unfrozen, layers_to_solve, non_finite, refuse_non_finite
from torchloco.layers import Layer
from torchloco.losses import Loss
from torchloco.outer import OuterRule, resolve_outer
from torchloco.regularizers import Regularizer
from torchloco.safety import check_safe
from torchloco.solvers import Solver
from torchloco.solving import Solving
from torchloco.state import check_choices, check_order, load, schedule_factor
from torchloco.targets import TargetRule
from torchloco.transfers import Transfer, get_transfer, nearest
from torchloco.uncalled import uncalled, warn_of_uncalled


class LocoProp(Optimizer):
    """LocoProp: several cheap local steps per layer for each back-propagation (Amid, Anil, Warmuth 2022).

    One forward and backward pass gives every supported layer its rows X, pre-activations A and G = ∂L/∂A. Each layer
    then minimises its own objective, independently of the others::

        minimise over W̃, b̃:   Σ_rows loss(X W̃ᵀ + b̃ ; T) + regularizer(W̃, W)

    Supported are `nn.Linear`, convolutions and transposed convolutions in one to three dimensions, the projections of
    `nn.MultiheadAttention`, and what `register_layer` was told of. All other parameters go to a fallback optimizer;
    those of layers that the model uses by their weight alone, without a call, at the first step, with a warning.
    `repr(optimizer)` and `optimizer.layers` say what was decided for every layer; transfer functions that are not given
    are discovered in the first forward pass. A model may be compiled by torch.compile, before or after the optimizer is
    built, but must not have been called compiled before; its first forward pass is then run twice, for discovery.
    Rows whose G is zero, as padding's is, take no part, but in convolutions with a kernel of more than one entry.

    Param groups are torch's, with the options `lr`, `activation_lr` and `local_steps`; what `"params"` lists may also
    be modules or layer names. A group with `"fallback": True` goes to the fallback optimizer, with its options.

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
        outer: What is done with a layer's displacement W̃ - W: an `OuterRule` such as `Bounded`, or a torch.optim class
            for `OuterOptimizer` of it; default: it is applied as it is.
        safe: Whether a solve may never leave a layer's local objective above its old value; first-order steps also end
            when it no longer falls. Costs a few evaluations of the objective per layer. Meant for solvers that carry no
            momentum from one mini-batch to the next; it slows the default ones down. Off in the paper.
        parallel: Whether several layers are solved at the same time on a CPU, each by its share of torch's threads,
            where their sizes keep all threads busy to the end. It takes memory for as many layers' gradients, loses
            time on layers of a few hundred units, and needs parts of your own (targets, losses, solvers) to be safe in
            threads. Without effect on other devices and data-parallel ranks. Default: one layer after the other.
        transfers: Transfer functions by layer name, e.g. ``{"decoder.0": "tanh"}``; names or `Transfer` objects.
        output: The transfer that matches the network loss, for layers whose pre-activations are the model's output:
            a transfer's name, or the criterion as a module, class or functional (BCE with logits ↔ sigmoid,
            cross-entropy ↔ softmax, MSE ↔ identity). Several heads with different losses are named by `transfers`.
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
        outer: OuterRule | Callable[..., Optimizer] | None = None,
        safe: bool = False,
        parallel: bool = False,
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
        self._objective = resolve_objective(loss, target, regularizer)
        self._solver = resolve_solver(solver)
        self._solver.check(self._objective.loss, regularizer)
        self._outer = resolve_outer(outer)
        model = unwrapped(model)
        self._safe = bool(safe)
        if safe:
            check_safe(self._objective.loss, regularizer)
        if not isinstance(parallel, bool):
            raise TypeError(f"parallel must be True or False, got {parallel!r}")
        self.parallel = parallel
        self._fallback = Fallback(fallback)
        self._plan = groups.Plan(model, params)
        self._unfrozen = Unfrozen(expected=params is not None)
        self._layers: dict[str, AttachedLayer] = {}
        given = self._resolve_transfers(transfers or {})
        end = None if output is None else output_transfer(output)
        defaults = {"lr": lr, "activation_lr": activation_lr, "local_steps": local_steps}
        groups.check_options(defaults)
        self._closed = False
        self._discovery = Discovery(model, end, given)
        try:
            super().__init__(self._plan.groups, defaults)
        except BaseException:
            self._take_hooks_off()
            raise
        for handle in self._discovery.handles:
            weakref.finalize(self, handle.remove)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One LocoProp update of every layer with a gradient, and one fallback step for the other parameters.

        Whatever is raised, the layers' parameters are as before the step. The inner averages of layers that had been
        solved already have taken it in, or, where a solve diverged, start anew; a fallback that itself raises may have
        changed its parameters. Of data-parallel ranks all raise if one does; where one fails amid the solves (out of
        memory), the others wait for it.

        Args:
            closure: Re-evaluates the model and returns the loss, with `backward()` called; optional.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: A gradient or the result of a local solve is not finite; a gradient has no captured rows, or
                belongs to another pass than they do; another rank refused, or would solve other problems.
            ValueError: A param group's option was set to a value outside its range.
        """
        loss = self._evaluate(closure)
        self._bind()  # trainers replace the entries of `state` by copies on the device
        try:
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            with self._full_precision():
                peers = peers_of(list(self._layers.values()))
                share_calls(list(self._layers.values()), peers, self._device)
                with peers.agreeing(self._device) as terms:
                    layers = self._ready_layers(group_of)
                    if peers.several:
                        terms += [layer.terms(group_of) for layer in layers]
                peers.share([layer.rows for layer in layers if layer.rows is not None])
                match_gradients(layers)
            with self._full_precision(), Originals() as old:
                solving = Solving(self._objective, self._solver, old, group_of, self._safe)
                kept = solving.all_of(layers, at_once=self.parallel and not peers.several)
                self._refuse_divergence(layers)
                with peers.agreeing(self._device):
                    if self._outer is not None:
                        for layer in layers:
                            layer.displace(self._outer, old, group_of)
                        self._refuse_divergence(layers)
                with peers.agreeing(self._device):
                    self._fallback.step(group_of)
            for layer, (target_keep, solver_keep) in zip(layers, kept, strict=True):
                layer.remember(self.state, "target", target_keep)
                layer.remember(self.state, "solver", solver_keep)
        finally:
            self._release()  # also after an error, so that the next pass can be right again
        return loss

    def _full_precision(self) -> torch.autocast:
        """Local products keep the weights' precision, wherever step() is called."""
        return torch.autocast(self._device.type, enabled=False)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if self._closed:
            raise RuntimeError("this LocoProp was closed; build a new one to go on training")
        with torch.enable_grad():
            return None if closure is None else closure()

    def _ready_layers(self, group_of: Mapping[Parameter, dict[str, Any]]) -> list[AttachedLayer]:
        """The layers with a gradient and its rows, after every check."""
        self._discovery.conclude()
        for group in self.param_groups:
            if not group.get("fallback"):
                groups.enter_step(group)
        refuse_non_finite({self._plan.names[p]: p.grad for p in group_of if p.grad is not None})
        self._unfrozen.warn({p: name for p, name in self._plan.names.items() if p not in group_of})
        strangers = uncalled(list(self._layers.values()))
        if strangers:
            self._give_to_fallback(strangers, group_of)
            warn_of_uncalled(strangers, self.fallback_name)
        layers = layers_to_solve(list(self._layers.values()))
        for layer in layers:
            self._follow_bias(layer)
            transfer, group = self._discovery.settle(layer.name), group_of[layer.weight]
            lr_factor = schedule_factor(group) if self._solver.uses_lr else 1.0  # others scale what they arrive at
            layer.collect(transfer, float(group["activation_lr"]), lr_factor)
        self._discovery.warn_if_output_unused()
        return layers

    def _refuse_divergence(self, layers: list[AttachedLayer]) -> None:
        """Raise if a solve left a weight that is not finite, and let the inner state of all layers start anew."""
        bad = set(non_finite({self._plan.names[p]: p.detach() for layer in layers for p in layer.params}))
        diverged = [layer for layer in layers if any(self._plan.names[p] in bad for p in layer.params)]
        if not diverged:
            return
        for layer in layers:  # those that did not diverge have taken in steps that are taken back, long ones maybe
            layer.forget()
            for p in layer.params:
                self.state.pop(p, None)
        self._bind()
        raise RuntimeError(
            f"the local steps of {', '.join(layer.name for layer in diverged)} diverged; all weights are as before the "
            "step, and the layers' inner state starts anew. Lower lr or activation_lr"
        )

    def _follow_bias(self, layer: AttachedLayer) -> None:
        """Let the bias take part in the layer's problem exactly when it has a gradient."""
        learn = layer.bias is not None and layer.bias.grad is not None and self._holds(layer.bias)
        if learn != layer.learn_bias:
            layer.learn_bias = learn
            self._make_optimizers(layer)

    def _give_to_fallback(self, layers: list[AttachedLayer], group_of: Mapping[Parameter, dict[str, Any]]) -> None:
        """Solve for these layers no more. Their parameters stay in their groups, on which schedulers may rely."""
        params = [p for layer in layers for p in layer.params]
        for group in self.param_groups:
            own = [p for p in params if group_of[p] is group]
            if own:
                self._fallback.adopt(own, self.state)
        for layer in layers:
            layer.detach(self.state)
            del self._layers[layer.name]
        self._bind()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, modules or layer names; layers found in it are attached.

        Raises:
            TypeError, ValueError: As for the constructor; nothing has been changed then.
            RuntimeError: Another LocoProp is attached to a layer.
        """
        if self._closed:
            raise RuntimeError("this LocoProp was closed; build a new one to go on training")
        split = self._plan.split(param_group)
        self._plan.check_new(split, self.param_groups, self.defaults)
        for layer in split.layers:
            capture.check_free(layer)
        # The fallback comes first, since a factory of the user's may raise; its group comes last.
        last = []
        if split.fallback:
            last = [self._fallback.add({**split.fallback_options, "params": split.fallback}, self.state)]
        if split.params:
            super().add_param_group({**split.options, "params": split.params})
            self.param_groups[-1].setdefault("highest_lr", float(self.param_groups[-1]["lr"]))
        try:
            for layer in split.layers:
                self._attach(layer)
        except BaseException:  # the user's solver or outer rule refuses it
            for layer in split.layers:
                if layer.name in self._layers:
                    self._layers.pop(layer.name).recorder.remove()
            if split.params:
                self.param_groups.pop()
            raise
        self.param_groups += last
        self._plan.adopt(split)
        for attached in self._layers.values():
            if attached.bias is not None and not attached.learn_bias and any(attached.bias is p for p in split.params):
                attached.learn_bias = True
                self._make_optimizers(attached)
        self._bind()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`, and the rows captured with them."""
        super().zero_grad(set_to_none)
        self._discovery.conclude()
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The state, as `torch.optim.Optimizer.state_dict` gives it, with the name of the solver it belongs to."""
        return {**super().state_dict(), "solvers": self._solver_names()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the given one is copied, so that it can be loaded again.

        Raises:
            ValueError: It belongs to another solver or does not fit the param groups; nothing has been changed then.
        """
        check_choices(state_dict.get("solvers", {}), self._solver_names())
        check_order(state_dict["param_groups"], self.param_groups)
        load(super().load_state_dict, self, state_dict)
        self._bind()

    def _solver_names(self) -> dict[str, str]:
        outer = "none" if self._outer is None else self._outer.name
        target = self._objective.name
        return {"target": target, "solver": self._solver.name, "outer": outer, "fallback": self._fallback.kind}

    def close(self) -> None:
        """Take the hooks off the model. The optimizer takes no further step; another can be attached."""
        self._take_hooks_off()
        self._discovery.conclude()
        self._release()
        self._layers = {}
        self._closed = True

    def _take_hooks_off(self) -> None:
        for layer in self._layers.values():
            layer.recorder.remove()
        for handle in self._discovery.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> LocoProp:
        raise TypeError(
            "a LocoProp is bound to its model and cannot be copied; copy the model, build a new LocoProp on it and "
            "load_state_dict(optimizer.state_dict())"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a LocoProp is bound to its model and cannot be pickled; save optimizer.state_dict() and load it into a "
            "new LocoProp built on the model"
        )

    @property
    def layers(self) -> list[LayerInfo]:
        """What was decided for each layer, in the model's order."""
        infos = []
        for layer in self._layers.values():
            decision = self._discovery.known(layer.name)
            transfer = decision.transfer if decision else None
            source = decision.source if decision else "not known before the first forward pass"
            loss, target = self._objective.of(transfer)
            d_out = layer.recorder.layer.d_out
            d_in = layer.weight.numel() // max(1, d_out)
            cost = None if layer.size is None else self._solver.multiply_adds(layer.size, self._steps_of(layer))
            if cost is not None and layer.size is not None:
                cost += layer.size.around
            infos.append(LayerInfo(layer.name, (d_out, d_in), transfer, source, loss, target, self._solver, cost))
        return infos

    @property
    def loss(self) -> Loss:
        """The loss of the local problems."""
        return self._objective.loss

    @property
    def target(self) -> TargetRule:
        """The rule for the targets of the local problems."""
        return self._objective.target

    @property
    def solver(self) -> Solver:
        """The solver of the local problems."""
        return self._solver

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer of the local problems, None for none."""
        return self._objective.regularizer

    @property
    def outer(self) -> OuterRule | None:
        """What is done with the displacements, None if they are applied as they are."""
        return self._outer

    @property
    def safe(self) -> bool:
        """Whether no solve may leave a local objective above its old value."""
        return self._safe

    @property
    def fallback_name(self) -> str:
        """The fallback optimizer's class and learning rates, or "none"."""
        return repr(self._fallback)

    @property
    def fallback_parameters(self) -> list[str]:
        """Names of the parameters that the fallback optimizer updates."""
        return [self._plan.names[p] for p in self._fallback.params]

    def _resolve_transfers(self, given: Mapping[str, str | Transfer]) -> dict[str, Transfer]:
        if not isinstance(given, Mapping):
            raise TypeError(f"transfers must be a dict from layer names to transfer functions, got {given!r}")
        known = list(self._plan.layers)
        for name in given:
            if name not in known:
                raise ValueError(
                    f"transfers names the layer {name!r}, which is no supported layer of this model"
                    f"{nearest(name, known)}; supported layers: {', '.join(known)}"
                )
        return {name: get_transfer(transfer) for name, transfer in given.items()}

    def _attach(self, layer: Layer) -> None:
        learn_bias = layer.bias is not None and self._holds(layer.bias)
        recorder = capture.Recorder(layer, weakref.WeakMethod(self._observe))
        weakref.finalize(self, recorder.remove)
        attached = AttachedLayer(layer.name, layer.weight, layer.bias, learn_bias, recorder)
        self._layers[layer.name] = attached
        if layer.transfer is not None:
            self._discovery.fix(layer.name, layer.transfer, f"always, {type(layer).__name__}")
        self._make_optimizers(attached)

    def _make_optimizers(self, layer: AttachedLayer) -> None:
        layer.make_optimizers(self._solver, self._outer, self.defaults["lr"])
        layer.bind(self.state, fresh=True)

    def _holds(self, p: Parameter) -> bool:
        return any(p is q for group in self.param_groups if not group.get("fallback") for q in group["params"])

    def _bind(self) -> None:
        """Let the inner optimizers and the fallback work on this optimizer's state and groups.

        So `state_dict` holds everything, keyed by parameter, and schedulers reach every group.
        """
        for layer in self._layers.values():
            layer.bind(self.state)
        self._fallback.bind(self.param_groups, self.state)

    def _observe(self, recorder: capture.Recorder, x: Tensor, output: Tensor) -> None:
        self._discovery.enter(x)
        self._discovery.follow(recorder.layer.name, output, recorder.layer.units)

    def _steps_of(self, layer: AttachedLayer) -> int:
        group = next(group for group in self.param_groups if any(p is layer.weight for p in group["params"]))
        return int(group["local_steps"])

    def _release(self) -> None:
        for layer in self._layers.values():
            layer.release()

    def __repr__(self) -> str:
        return describe(self)
