"""A layer's second-order directions on one mini-batch: FOOF, K-FAC and Gauss-Newton."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locobench import problems
from torchloco.conjugate import conjugate_gradient

FISHER_SAMPLES = 10  # labels per image
_CG_ITERATIONS, _CG_TOLERANCE = 300, 1e-3


@dataclass
class Layer:
    """A layer on the mini-batch, and what the second-order directions need of it. A bias is the weight's last column.

    Args:
        name: In the model.
        x: Its rows with a column of ones, (N, d_in + 1).
        a: Its pre-activations, (N, d_out).
        rest: The modules that follow it, up to the logits: linear layers and elementwise activations.
        gradient: ∂L/∂W, (d_out, d_in + 1).
        fisher: B, the mean over examples of gᵀg with g the gradient of an example's loss at `a`, for labels drawn from
            the model's own distribution, (d_out, d_out).
        curvature: Mean diagonal entry of the layer's Gauss-Newton block, from the same labels.
    """

    name: str
    x: Tensor
    a: Tensor
    rest: list[nn.Module]
    gradient: Tensor
    fisher: Tensor
    curvature: float

    def __post_init__(self) -> None:
        # C = XᵀX and B by their eigenvalues, which rounding may have left a little below zero
        c, right = torch.linalg.eigh(self.x.t() @ self.x)
        b, left = torch.linalg.eigh(self.fisher)
        self.c: Tensor = c.clamp(min=0)
        self.b: Tensor = b.clamp(min=0)
        self._right: Tensor = right
        self._left: Tensor = left

    @torch.no_grad()
    def directions(self, damping: float) -> tuple[dict[str, Tensor], float]:
        """The second-order directions, each (d_out, d_in + 1), and the residual of the Gauss-Newton system.

        With g = ∂L/∂W and m the mean diagonal entry of whatever is damped: FOOF g (C + λmI)⁻¹; K-FAC
        (B + λmI)⁻¹ g (C + λmI)⁻¹; Gauss-Newton the d with (block + λmI) d = g.

        Args:
            damping: λ.
        """
        over_c = 1 / (self.c + damping * self.c.mean())
        over_b = 1 / (self.b + damping * self.b.mean())[:, None]
        rotated = self._rotate(self.gradient)
        gauss_newton, residual = self._gauss_newton(damping * self.curvature)
        return {
            "foof": self._rotate_back(rotated * over_c),
            "kfac": self._rotate_back(rotated * over_c * over_b),
            "gauss-newton": gauss_newton,
        }, residual

    @torch.no_grad()
    def gauss_newton_product(self) -> Callable[[Tensor], Tensor]:
        """The product of the layer's Gauss-Newton block with a change of its weight, (d_out, d_in + 1)."""
        logits = self.a
        maps: list[tuple[bool, Tensor]] = []  # their Jacobian: weights, and derivatives of activations
        for module in self.rest:
            if isinstance(module, nn.Linear):
                maps.append((True, module.weight.detach()))
                logits = module(logits)
            else:
                logits, pull_back = torch.func.vjp(module, logits)  # type: ignore[misc]
                (derivative,) = pull_back(torch.ones_like(logits))
                maps.append((False, derivative))
        probabilities = logits.sigmoid()
        output_curvature = probabilities * (1 - probabilities) / len(self.x)

        def product(change: Tensor) -> Tensor:
            tangent = self.x @ change.t()
            for linear, factor in maps:
                tangent = tangent @ factor.t() if linear else tangent * factor
            tangent = tangent * output_curvature
            for linear, factor in reversed(maps):
                tangent = tangent @ factor if linear else tangent * factor
            return tangent.t() @ self.x

        return product

    def _gauss_newton(self, damping: float) -> tuple[Tensor, float]:
        # In coordinates in which the Kronecker product B ⊗ C / N, damped, is the identity: few iterations are enough.
        scale = (torch.outer(self.b, self.c) / len(self.x) + damping).rsqrt_()
        product = self.gauss_newton_product()

        def image(change: Tensor) -> Tensor:
            change = self._rotate_back(scale * change)
            return scale * self._rotate(product(change) + damping * change)

        right = scale * self._rotate(self.gradient)
        solution = conjugate_gradient(image, right, _CG_ITERATIONS, _CG_TOLERANCE, per_unit=False)
        residual = float((image(solution) - right).norm() / right.norm())
        return self._rotate_back(scale * solution), residual

    def _rotate(self, matrix: Tensor) -> Tensor:
        return self._left.t() @ matrix @ self._right

    def _rotate_back(self, matrix: Tensor) -> Tensor:
        return self._left @ matrix @ self._right.t()


def layers(model: problems.Autoencoder, batch: Tensor, seed: int = 0, samples: int = FISHER_SAMPLES) -> list[Layer]:
    """The model's layers on a mini-batch, in their order.

    Args:
        model: The autoencoder, which is left as it is.
        batch: Images, (N, pixels), of the model's dtype.
        seed: Of the labels that are drawn for the Fisher.
        samples: Labels per image.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = [*model.encoder, *model.decoder]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rows, pre, rests = [], [], []
    out = batch
    for number, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            rows.append(torch.cat([out.detach(), out.new_ones(len(out), 1)], 1))
        out = module(out)
        if isinstance(module, nn.Linear):
            pre.append(out)
            rests.append(modules[number + 1 :])
    gradients = torch.autograd.grad(problems.loss(out, batch), pre, retain_graph=True)
    probabilities = out.detach().sigmoid()
    fishers = [a.new_zeros(a.shape[1], a.shape[1]) for a in pre]
    curvatures = [0.0] * len(pre)
    for sample in range(samples):
        errors = probabilities - torch.bernoulli(probabilities, generator=generator)
        drawn = torch.autograd.grad(out, pre, errors, retain_graph=sample < samples - 1)
        for i, (g, x) in enumerate(zip(drawn, rows, strict=True)):
            fishers[i].addmm_(g.t(), g, alpha=1 / (len(g) * samples))
            squares = g.square().sum(1) @ x.square().sum(1)
            curvatures[i] += float(squares) / (len(g) * samples * g.shape[1] * x.shape[1])
    with torch.no_grad():
        return [
            Layer(name, x, a.detach(), rest, g.t() @ x, fisher, curvature)
            for name, x, a, rest, g, fisher, curvature in zip(
                names, rows, pre, rests, gradients, fishers, curvatures, strict=True
            )
        ]
