"""Param groups: which parameters belong to a layer with a local problem, which to the fallback optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from torchloco.checks import check_count, check_range
from torchloco.layers import SUPPORTED, Layer, layers_of
from torchloco.transfers import nearest

OPTIONS = ("lr", "activation_lr", "local_steps")


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a group of layers.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range, or no such option.
    """
    for name in options:
        if name not in (*OPTIONS, "initial_lr", "highest_lr"):
            raise ValueError(
                f"unknown option {name!r} in a param group{nearest(name, list(OPTIONS))}; supported: "
                f"{', '.join(OPTIONS)}, and 'fallback': True for a group of the fallback optimizer with its own options"
            )
    if "lr" in options:
        check_range("lr", options["lr"], 0)
    if "activation_lr" in options:
        check_range("activation_lr", options["activation_lr"], 0)
    if "local_steps" in options:
        check_count("local_steps", options["local_steps"])


def enter_step(group: MutableMapping[str, Any]) -> None:
    """Check the options of a group again, since schedulers and users write to them, and note the highest lr so far.

    An lr of 0 is allowed.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range.
    """
    check_range("lr of a param group", group["lr"], 0, inclusive=True)
    check_range("activation_lr of a param group", group["activation_lr"], 0)
    check_count("local_steps of a param group", group["local_steps"])
    group["highest_lr"] = max(float(group["highest_lr"]), float(group["lr"]))


@dataclass
class Split:
    """A param group taken apart."""

    params: list[Parameter] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    fallback: list[Parameter] = field(default_factory=list)
    fallback_options: dict[str, Any] = field(default_factory=dict)


class Plan:
    """Sorts a model's parameters into layers and the rest.

    Args:
        model: The model.
        params: What the user gave: None for all that require a gradient, parameters, modules, layer names, or groups.

    Raises:
        TypeError, ValueError: See `LocoProp`.
    """

    def __init__(self, model: nn.Module, params: Iterable[Any] | None) -> None:
        self._model = model
        self.names: dict[Parameter, str] = {}
        self.layers: dict[str, Layer] = {}
        self._weights: dict[Parameter, str] = {}
        self._biases: dict[Parameter, str] = {}
        self._survey()
        self.groups = self._as_groups(params)
        given = [(p, g) for g in self.groups for p in self._flatten(g["params"])]
        self._planned = {p for p, g in given if not g.get("fallback")}
        if not any(p in self._weights for p in self._planned):
            raise ValueError(
                f"{type(model).__name__} has no supported layer among the parameters to train; supported: {SUPPORTED} "
                "(not parametrized, the weight not shared with another module). Use a torch.optim optimizer instead"
            )

    def _survey(self) -> None:
        """Take in what the model has by now; what is known stays as it is."""
        for name, p in self._model.named_parameters():
            if isinstance(p, UninitializedParameter):
                raise ValueError(
                    f"parameter {name!r} is not initialised yet; call the model once (lazy modules) "
                    "before building LocoProp"
                )
            self.names.setdefault(p, name)
        owners: dict[Parameter, int] = {}
        for module in self._model.modules():
            for own in module._parameters.values():
                if own is not None:
                    owners[own] = owners.get(own, 0) + 1
        for name, module in self._model.named_modules():
            for layer in layers_of(name, module):
                # A parameter of two modules has one gradient from both; neither's rows alone explain it.
                if layer.name not in self.layers and all(owners[p] == 1 for p in layer.params):
                    self.layers[layer.name] = layer
                    self._weights[layer.weight] = layer.name
                    if layer.bias is not None:
                        self._biases[layer.bias] = layer.name

    def split(self, group: Mapping[str, Any]) -> Split:
        """Take one param group apart; changes nothing.

        Raises:
            TypeError, ValueError: See `LocoProp`.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"a param group must be a dict with 'params', got {group!r}")
        options = {key: value for key, value in group.items() if key not in ("params", "fallback")}
        params = self._flatten(group["params"])
        if len(set(params)) != len(params):
            raise ValueError("a param group lists the same parameter twice")
        if group.get("fallback"):
            return Split(fallback=params, fallback_options=options)
        check_options(options)
        planned = self._planned.union(params)
        split = Split(options=options)
        for p in params:
            if p in self._weights:
                name = self._weights[p]
                split.layers.append(self.layers[name])
                split.params.append(p)
            elif p in self._biases and self._weight_of_bias(p) in planned and self._weight_of_bias(p).requires_grad:
                split.params.append(p)
            else:
                split.fallback.append(p)
        return split

    def check_new(self, split: Split, groups: list[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
        """Refuse a split that does not go with the groups there are.

        Raises:
            ValueError: A parameter is in one of them; a layer's weight and bias would be different problems.
        """
        taken = {p: group for group in groups for p in group["params"]}
        for p in [*split.params, *split.fallback]:
            if p in taken:
                raise ValueError(f"parameter {self.names[p]!r} is in another param group already")
        new = {**defaults, **split.options}
        groups_of: dict[str, dict[str, Any]] = {}
        for p, group in [*taken.items(), *((p, new) for p in split.params)]:
            if group.get("fallback"):
                continue
            name = self.layer_of(p)
            other = groups_of.setdefault(name, group)
            for option in ("activation_lr", "local_steps"):
                if group[option] != other[option]:
                    raise ValueError(
                        f"layer {name!r}: weight and bias are one problem, but their param groups say {option} "
                        f"{other[option]:g} and {group[option]:g}; give both groups the same (lr may differ)"
                    )

    def adopt(self, split: Split) -> None:
        """Remember the parameters of a group that was added."""
        self._planned.update(split.params)

    def layer_of(self, p: Parameter) -> str:
        """The name of the layer a weight or bias belongs to."""
        return self._weights[p] if p in self._weights else self._biases[p]

    def _weight_of_bias(self, bias: Parameter) -> Parameter:
        return self.layers[self._biases[bias]].weight

    def _as_groups(self, params: Iterable[Any] | None) -> list[dict[str, Any]]:
        if params is None:
            return [{"params": [p for p in self.names if p.requires_grad]}]
        if isinstance(params, Mapping):
            raise TypeError("params must be a list of groups; put the one group into a list: params=[{...}]")
        entries = list(params)
        if not entries:
            raise ValueError("params is empty; leave it out to train all parameters that require a gradient")
        if all(isinstance(entry, Mapping) for entry in entries):
            for entry in entries:
                if "params" not in entry:
                    raise TypeError(
                        f"a param group must be a dict with 'params', got the keys {', '.join(map(str, entry))}"
                    )
            # Iterators are read once here, and again by torch.
            return [{**entry, "params": self._flatten(entry["params"])} for entry in entries]
        return [{"params": self._flatten(entries)}]

    def _flatten(self, entries: Any) -> list[Parameter]:
        return list(self._each(entries))

    def _each(self, entry: Any) -> Iterator[Parameter]:
        if isinstance(entry, Parameter):
            if entry not in self.names:
                self._survey()  # the model may have grown
            if entry not in self.names:
                raise ValueError(f"params holds a parameter of shape {tuple(entry.shape)} that is not the model's")
            yield entry
        elif isinstance(entry, nn.Module):
            for p in entry.parameters():
                yield from self._each(p)
        elif isinstance(entry, str):
            layer = self.layers.get(entry)
            yield from self._each(self._module(entry) if layer is None else layer.params)
        elif (
            isinstance(entry, tuple)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], Parameter)
        ):
            yield from self._each(entry[1])  # named_parameters()
        elif isinstance(entry, Iterable) and not isinstance(entry, Mapping | Tensor):
            for item in entry:
                yield from self._each(item)
        else:
            raise TypeError(
                f"params may hold parameters, modules, names of modules, or groups of them, got {type(entry).__name__}"
            )

    def _module(self, name: str) -> nn.Module:
        modules: dict[str, nn.Module] = dict(self._model.named_modules())
        if name not in modules:
            raise ValueError(
                f"params names {name!r}, which is no module of the model{nearest(name, list(modules))}; "
                f"supported layers: {', '.join(self.layers)}"
            )
        return modules[name]
