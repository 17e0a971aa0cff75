"""The optimizer of all parameters that have no local problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.state import schedule_factor
from torchloco.steps import refuse_closure


class Fallback:
    """An optimizer that is made with its first parameters, and works on LocoProp's state and groups.

    Args:
        make: A class or factory `(params) → Optimizer`; None for `torch.optim.AdamW`.

    Attributes:
        optimizer: None as long as there are no parameters for it.

    Raises:
        TypeError: `make` is neither, or its optimizer needs a closure.
    """

    def __init__(self, make: Callable[..., Optimizer] | None) -> None:
        if make is not None and (not callable(make) or isinstance(make, Optimizer)):
            raise TypeError(
                "fallback must be a torch.optim class or a factory (params) → Optimizer, got "
                f"{type(make).__name__}; it is given the parameters in no supported layer"
            )
        refuse_closure(make)
        self._make = make or torch.optim.AdamW
        self.optimizer: Optimizer | None = None
        self._adopted: list[tuple[dict[str, Any], float]] = []

    def add(self, group: dict[str, Any], state: MutableMapping[Any, Any]) -> dict[str, Any]:
        """Take a group in; returns it as the optimizer has it, marked.

        Raises:
            TypeError: The factory made no optimizer.
        """
        if self.optimizer is None:
            made = self._make([group])
            if not isinstance(made, Optimizer):
                raise TypeError(f"fallback returned {type(made).__name__}, not a torch.optim.Optimizer")
            self.optimizer = made
        else:
            self.optimizer.add_param_group(group)
        added = self.optimizer.param_groups[-1]
        for p in added["params"]:
            if p in self.optimizer.state and self.optimizer.state is not state:
                state[p].update(self.optimizer.state[p])  # what an optimizer fills in when it is made
        added["fallback"] = True
        return added

    def adopt(self, params: list[Parameter], state: MutableMapping[Any, Any]) -> None:
        """Take in parameters that stay in a group of LocoProp's own, on which schedulers and saved states rely.

        Their learning rate is this optimizer's, and follows what a scheduler makes of that group's.
        """
        group = self.add({"params": params}, state)
        self._adopted.append((group, float(group["lr"])))

    def bind(self, groups: list[dict[str, Any]], state: MutableMapping[Any, Any]) -> None:
        """Let the optimizer work on LocoProp's groups and state."""
        if self.optimizer is not None:
            self.optimizer.state = state  # type: ignore[assignment]
            own = [group for group in groups if group.get("fallback")]
            self.optimizer.param_groups = own + [group for group, _ in self._adopted]

    def step(self, group_of: Mapping[Parameter, dict[str, Any]]) -> None:
        """One step, if there is anything to step on."""
        if self.optimizer is not None:
            for group, lr in self._adopted:
                group["lr"] = lr * schedule_factor(group_of[group["params"][0]])
            self.optimizer.step()

    @property
    def params(self) -> list[Parameter]:
        """All of its parameters."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [p for group in groups for p in group["params"]]

    @property
    def kind(self) -> str:
        """The optimizer's class, or "none"."""
        return "none" if self.optimizer is None else type(self.optimizer).__name__

    def __repr__(self) -> str:
        if self.optimizer is None:
            return "none"
        rates = sorted({f"{group['lr']:g}" for group in self.optimizer.param_groups})
        return f"{self.kind}(lr={', '.join(rates)})"
