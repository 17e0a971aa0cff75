"""K-FAC, with curvlinops' factors and inverses, as an optimizer of the benchmark."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locobench.libraries import CURVLINOPS
from locobench.stepping import plain_step


class KFAC(Optimizer):
    """Momentum on the gradient preconditioned by Kronecker factors: B⁻¹ ∂L/∂W A⁻¹, a bias being W's last column.

    A is the mean of xxᵀ over a layer's inputs, B that of ggᵀ over the gradients of an image's loss at its outputs, for
    a label drawn from the model's own distribution. Both are running averages over the steps that renew them. As is
    usual, a step that would change the model's distribution too much is shortened.

    Args:
        model: All its parameters must be weights and biases of linear layers.
        lr: Learning rate.
        damping: λ, split between the factors by Martens and Grosse's heuristic.
        momentum: Decay of the sum of the preconditioned gradients.
        clip: Largest lr² · ⟨direction, gradient⟩ of a step, with the direction before momentum; infinite for none.
        every: Steps from one renewal of factors and inverses to the next.
        decay: Of the running averages, which are plain means at first.
        fisher: curvlinops' name for the kind of B: `mc` as above, or `forward-only` for the identity, which is FOOF.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        damping: float = 0.1,
        momentum: float = 0.9,
        clip: float = 1e-2,
        every: int = 10,
        decay: float = 0.95,
        fisher: str = "mc",
    ) -> None:
        options = {"lr": lr, "damping": damping, "momentum": momentum, "clip": clip}
        options |= {"every": every, "decay": decay}
        super().__init__(model.parameters(), options)
        if fisher != "mc":
            self.defaults["fisher"] = fisher  # of the class, not of a group: it cannot change later
        self._model, self._fisher = model, fisher
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.param_groups[0]["steps"] = 0

    def step_on(self, batch: Tensor) -> Tensor:
        """A step of training; the factors need the images. Returns the loss before the step."""
        group = self.param_groups[0]
        if group["steps"] % group["every"] == 0:
            self._renew(batch, group)
        return plain_step(self._model, self, batch)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, with the inverses that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        gradients = [_joined(layer.weight.grad, layer.bias.grad) for layer in self._layers.values()]
        states = [self.state[layer.weight] for layer in self._layers.values()]
        directions = [state["inverse_b"] @ g @ state["inverse_a"] for state, g in zip(states, gradients, strict=True)]
        length = torch.stack([(d * g).sum() for d, g in zip(directions, gradients, strict=True)]).sum()
        factor = (group["clip"] / (group["lr"] ** 2 * length)).sqrt().clamp(max=1)
        for layer, state, direction in zip(self._layers.values(), states, directions, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(direction)
            change = state["momentum"].mul_(group["momentum"]).addcmul_(direction, factor)
            layer.weight.sub_(change[:, :-1], alpha=group["lr"])
            layer.bias.sub_(change[:, -1], alpha=group["lr"])
        group["steps"] += 1
        return loss

    def _renew(self, batch: Tensor, group: dict[str, Any]) -> None:
        curvlinops = CURVLINOPS.load()
        params = group["params"]
        factors = curvlinops.KFACLinearOperator(
            self._model,
            nn.BCEWithLogitsLoss(reduction="sum"),
            params,
            [(batch, batch)],
            check_deterministic=False,
            seed=group["steps"],
            fisher_type=self._fisher,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(batch),
        )
        factors.compute_kronecker_factors()
        found = factors.state_dict()
        decay = min(1 - 1 / (group["steps"] // group["every"] + 1), group["decay"])
        for name, layer in self._layers.items():
            a, b = found["input_covariances"][name], found["gradient_covariances"][name]
            if self._fisher != "forward-only":
                b.div_(len(batch))
            state = self.state[layer.weight]
            if decay:
                a.lerp_(state["a"], decay)
                b.lerp_(state["b"], decay)
            state["a"], state["b"] = a, b
        inverse = curvlinops.KFACInverseLinearOperator(factors, group["damping"], use_heuristic_damping=True)
        inverse @ [p.detach() for p in params]  # computes and keeps the inverses
        inverses = inverse.state_dict()
        for name, layer in self._layers.items():
            state = self.state[layer.weight]
            state["inverse_a"] = inverses["inverse_input_covariances"][name]
            state["inverse_b"] = inverses["inverse_gradient_covariances"][name]


def _joined(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or bias is None:
        raise RuntimeError("K-FAC needs a gradient for the weight and the bias of every linear layer")
    return torch.cat([weight, bias[:, None]], 1)
