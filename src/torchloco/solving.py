"""The local problems of one step, solved: one layer after the other, or several at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Parameter

from torchloco.attached import AttachedLayer
from torchloco.guards import Originals
from torchloco.objective import Objective
from torchloco.parallel import each
from torchloco.safety import solve_safely
from torchloco.solvers import Solver, Task
from torchloco.state import schedule_factor

Kept = tuple[dict[str, Any], dict[str, Any]]
"""What a layer's target and the solver want to remember of a problem."""


@dataclass(frozen=True)
class Solving:
    """What the problems of one step have in common.

    Args:
        objective: Which loss, target and regularizer a layer has.
        solver: Of the local problems.
        old: Where the parameters are kept as they were.
        group_of: The param group of each parameter.
        safe: Whether no solve may raise its objective.
    """

    objective: Objective
    solver: Solver
    old: Originals
    group_of: Mapping[Parameter, dict[str, Any]]
    safe: bool

    def all_of(self, layers: list[AttachedLayer], *, at_once: bool) -> list[Kept]:
        """Solve the problems of these layers.

        Args:
            layers: With their rows.
            at_once: Whether several are solved at the same time, where they are on a CPU.

        Returns:
            What is to be remembered of each, in their order.
        """
        if not at_once or any(layer.weight.device.type != "cpu" for layer in layers):
            return [self.one(layer) for layer in layers]
        costs = [layer.weight.numel() * (0 if layer.rows is None else layer.rows.inputs.n) for layer in layers]
        return each(self._in_a_thread, layers, costs)

    @torch.no_grad()
    def _in_a_thread(self, layer: AttachedLayer) -> Kept:
        with torch.autocast("cpu", enabled=False):
            return self.one(layer)

    def one(self, layer: AttachedLayer) -> Kept:
        """Solve the problem of this layer, and let go of its rows."""
        self.old.keep(layer.params)
        problem = self.objective.problem(layer, self.old)
        groups = [self.group_of[p] for p in layer.params]
        task = Task(
            problem=problem,
            params=layer.params,
            lrs=[group["lr"] for group in groups],
            steps=self.group_of[layer.weight]["local_steps"],
            inner=layer.inner,
            scales=[schedule_factor(group) for group in groups],
            safe=self.safe,
            memory=layer.memory.get("solver", {}),
        )
        layer.size = replace(problem.size, safe=self.safe)
        if self.safe:
            solve_safely(self.solver, task)
        else:
            self.solver.solve(task)
        layer.release()  # makes room for the next layer's buffers
        return problem.rows.keep, task.keep
