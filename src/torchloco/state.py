"""What an optimizer keeps beyond torch's conventions: the memory of targets and solvers, and the lr it was given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def schedule_factor(group: Mapping[str, Any]) -> float:
    """What a scheduler has made of the lr that the group was given; 1 at most, not to overshoot a minimum."""
    return min(1.0, float(group["lr"]) / float(group["given_lr"]))


def load(torchs: Callable[[dict[str, Any]], None], optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a copy of a state, the memories as they are: torch would cast whatever they hold to the weight's dtype.

    Args:
        torchs: torch's own `load_state_dict` of the optimizer.
        optimizer: The optimizer.
        state_dict: The state.
    """
    state = copy.deepcopy(dict(state_dict))
    memories = {key: entry.pop("memory") for key, entry in state["state"].items() if "memory" in entry}
    given = [group.get("given_lr") for group in optimizer.param_groups]
    torchs(state)
    for group, lr in zip(optimizer.param_groups, given, strict=True):
        if lr is not None:
            group.setdefault("given_lr", lr)
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
