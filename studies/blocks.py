"""A transformer's block as one local problem: its parameters jointly move its output towards Y - γG."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Blocks(Optimizer):
    """minimise Σ ½‖f(X; θ̃) - (Y - γG)‖² over each block's parameters θ̃, by steps of AdamW that keeps its state.

    Parameters in no block take one step of AdamW on the network's loss.

    Args:
        model: With its blocks, each of one input and one output, in `model.blocks`.
        lr: Of the steps inside, decayed over them to 0.
        gamma: γ.
        steps: Inside, for each mini-batch.
        rest_lr: Of all other parameters.
    """

    def __init__(
        self, model: nn.Module, lr: float, gamma: float = 100.0, steps: int = 5, rest_lr: float = 3e-3
    ) -> None:
        self.gamma, self.steps = gamma, steps
        self.blocks = list(model.blocks)
        self.seen: dict[nn.Module, list[Tensor]] = {}
        self.inner = {block: torch.optim.AdamW(block.parameters(), lr, weight_decay=0.0) for block in self.blocks}
        own = {p for block in self.blocks for p in block.parameters()}
        self.rest = torch.optim.AdamW([p for p in model.parameters() if p not in own], rest_lr)
        super().__init__(list(own), {"lr": lr})
        self.param_groups += self.rest.param_groups  # one schedule for all
        for block in self.blocks:
            block.register_forward_hook(self._see)

    def _see(self, block: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if y.requires_grad and block not in self.seen:
            seen = self.seen[block] = [args[0].detach(), y.detach()]
            y.register_hook(lambda g: seen.append(g.detach()))

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Solve every block's problem, and step on the rest."""
        self.rest.step()
        for block in self.blocks:
            x, y, g = self.seen[block]
            inner = self.inner[block]
            for step in range(self.steps):
                inner.param_groups[0]["lr"] = self.param_groups[0]["lr"] * (1 - step / self.steps)
                inner.zero_grad()
                (0.5 * (block(x) - y + self.gamma * g).square().sum()).backward()
                inner.step()
        self.seen.clear()
