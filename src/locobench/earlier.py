"""PyPI's `locoprop` 0.1.0, an independent implementation, in the place of an optimizer: for its price."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from locobench import problems
from locobench.libraries import LOCOPROP


class EarlierLocoProp(Optimizer):
    """That package's trainer on the layers of the autoencoder. It does whole steps, so there is no `step` apart.

    Args:
        model: The autoencoder; another model's layers and activations would not be known.
        local_steps: Passes over the batch per layer; the rest is as the package has it.
    """

    def __init__(self, model: nn.Module, local_steps: int = 10) -> None:
        package = LOCOPROP.load()
        if not isinstance(model, problems.Autoencoder):
            raise TypeError(f"this needs the benchmark's autoencoder, got {type(model).__name__}")
        super().__init__(model.parameters(), {"local_steps": local_steps})
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        code, output = len(model.encoder) // 2, len(linears) - 1
        activation = type(model.encoder[1])
        layers = [
            package.LocoLayer(linear, nn.Sigmoid(), implicit=True)
            if number == output
            else package.LocoLayer(linear, nn.Identity() if number == code else activation())
            for number, linear in enumerate(linears)
        ]
        self._trainer = package.LocopropTrainer(nn.Sequential(*layers), problems.loss, local_iterations=local_steps)
        for part in self._trainer.opts:
            part.state = self.state  # their parameters are apart

    def step_on(self, batch: Tensor) -> Tensor:
        """A step of training. Returns the loss before the step."""
        loss: Tensor = self._trainer.step(batch, batch)
        return loss.detach()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Not by itself: the trainer takes whole steps."""
        raise RuntimeError("PyPI's locoprop takes whole steps only: step_on")
