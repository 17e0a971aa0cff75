"""Two optimizers as one: matrices go to the first, the rest to the second, as users of Muon do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Pair(Optimizer):
    """An optimizer for the matrices of a model and one for its other parameters, with one state and one schedule.

    Args:
        model: The model.
        matrices: Makes the optimizer of all parameters with two dimensions.
        rest: Makes that of all others.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Callable[[list[nn.Parameter]], Optimizer],
        rest: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:
        params = list(model.parameters())
        self.parts = [matrices([p for p in params if p.dim() == 2]), rest([p for p in params if p.dim() != 2])]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._bind()

    def _bind(self) -> None:
        """Let both parts work on this optimizer's groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._bind()
