"""What an optimizer keeps beyond torch's conventions: the memory of targets and solvers, and its highest lr."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def schedule_factor(group: Mapping[str, Any]) -> float:
    """What a scheduler has made of lr: what it is relative to the highest that it was, or was given as."""
    return float(group["lr"]) / max(float(group["lr"]), float(group["highest_lr"]))


def check_choices(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise unless the state was saved with the same target, solver, outer rule and fallback, as far as it has them.

    Raises:
        ValueError: It was not.
    """
    pairs = [(saved.get(name, "none"), choice) for name, choice in own.items()]
    if not saved or any(one != other for one, other in pairs if "none" not in (one, other)):
        raise ValueError(
            f"the state was saved by {_listed(saved) or 'another kind of optimizer'}, this LocoProp has {_listed(own)}"
            "; build LocoProp with the choices that the state was saved with"
        )


def _listed(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {choice}" for name, choice in choices.items())


def check_order(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the same param groups belong to the fallback.

    Raises:
        ValueError: They do not.
    """
    kinds = [[bool(group.get("fallback")) for group in groups] for groups in (saved, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "the state's param groups come in another order: which of them belong to the fallback is "
            f"{kinds[0]} in the state and {kinds[1]} here; build LocoProp with the groups it was saved with"
        )


def load(torchs: Callable[[dict[str, Any]], None], optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a copy of a state, the memories as they are: torch would cast whatever they hold to the weight's dtype.

    Args:
        torchs: torch's own `load_state_dict` of the optimizer.
        optimizer: The optimizer.
        state_dict: The state.
    """
    state = copy.deepcopy(dict(state_dict))
    memories = {key: entry.pop("memory") for key, entry in state["state"].items() if "memory" in entry}
    highest = [group.get("highest_lr") for group in optimizer.param_groups]
    torchs(state)
    for group, lr in zip(optimizer.param_groups, highest, strict=True):
        if lr is not None:
            group.setdefault("highest_lr", lr)
    keys = [key for group in state["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        if key in memories:
            optimizer.state[p]["memory"] = _on_device(memories[key], p.device)


def _on_device(kept: Any, device: torch.device) -> Any:
    """What a target or solver has kept, with its tensors on that device."""
    if isinstance(kept, Tensor):
        return kept.to(device)
    if isinstance(kept, dict):
        return {key: _on_device(value, device) for key, value in kept.items()}
    if isinstance(kept, list | tuple):
        return type(kept)(_on_device(value, device) for value in kept)
    return kept
