"""Transfer functions f with their convex integrals F (∇F = f), which induce the matching losses.

A transfer function maps pre-activations A to post-activations Y = f(A). Every non-decreasing f is the gradient of a
convex F, and the Bregman divergence of F is its matching loss (Helmbold, Kivinen, Warmuth 1999). All functions here
take and return tensors of shape (N, d_out) and are written so that no intermediate overflows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TensorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transfer:
    """A transfer function with what a local problem may need to know of it.

    Args:
        name: How `repr` and error messages call it.
        function: f, from pre-activations (N, d_out) to post-activations (N, d_out).
        integral: F with ∇F = f, elementwise (for softmax one value per row, shape (N, 1)). Only needed to report the
            value of a matching loss; None if unknown.
        conjugate: F*, the convex conjugate, on post-activations; not finite outside the range of f. None if unknown.
        derivative: f′, elementwise; None leaves it to autograd.
        in_place: f written over its argument, where torch has such a form. Saves memory traffic, changes nothing else.
        monotone: Whether f is non-decreasing, so that its matching loss is convex.
        elementwise: False for transfers that mix the units of a row, such as softmax.
    """

    name: str
    function: TensorMap
    integral: TensorMap | None = None
    conjugate: TensorMap | None = None
    derivative: TensorMap | None = None
    in_place: TensorMap | None = None
    monotone: bool = True
    elementwise: bool = True

    def __call__(self, a: Tensor) -> Tensor:
        """Post-activations f(a)."""
        return self.function(a)

    def apply_(self, a: Tensor) -> Tensor:
        """Post-activations f(a), written over `a` where torch can do that."""
        return self.function(a) if self.in_place is None else self.in_place(a)

    def vjp(self, a: Tensor, r: Tensor) -> Tensor:
        """The product of `r` (N, d_out) with the Jacobian of f at `a`; by autograd where `derivative` is not given."""
        if self.derivative is not None:
            return r * self.derivative(a)
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            (product,) = torch.autograd.grad(self.function(leaf), leaf, r)
        return product

    def __repr__(self) -> str:
        return f"Transfer({self.name})"


_MINUS_ONE = torch.tensor(-1.0)


def _tanh_(a: Tensor) -> Tensor:
    """Tanh over its argument. In float32 on a CPU torch's sigmoid is about four times as fast as its tanh."""
    if a.device.type == "cpu" and a.dtype == torch.float32:
        return torch.add(_MINUS_ONE, a.mul_(2).sigmoid_(), alpha=2, out=a)
    return torch.tanh_(a)


def _step(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


# Coefficients B_2k / (2k + 1)! of the Bernoulli series of the dilogarithm in u = -log(1 - x).
_DILOG = tuple(
    b / math.factorial(2 * k + 1)
    for k, b in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510), start=1)
)


def _softplus_integral(a: Tensor) -> Tensor:
    """-Li₂(-eᵃ), the integral of softplus from minus infinity.

    For a > 0 the inversion formula folds the argument back to e^-a <= 1, where u = log(1 + e^-|a|) <= log 2 makes the
    Bernoulli series converge to float64 rounding in eight terms.
    """
    u = -torch.log1p(torch.exp(-a.abs()))
    u2 = u * u
    series = torch.zeros_like(u)
    for coefficient in reversed(_DILOG):
        series = (series + coefficient) * u2
    folded = -(u * (1 + series) - u2 / 4)
    return torch.where(a > 0, math.pi**2 / 6 + a * a / 2 - folded, folded)


def _xlogx(y: Tensor) -> Tensor:
    product: Tensor = torch.special.xlogy(y, y)
    return product


def leaky_relu(negative_slope: float = 0.01) -> Transfer:
    """Leaky ReLU of slope `negative_slope` >= 0 for negative pre-activations."""
    s = float(negative_slope)
    return Transfer(
        "leaky_relu" if s == 0.01 else f"leaky_relu({s:g})",
        lambda a: F.leaky_relu(a, s),
        integral=lambda a: a * F.leaky_relu(a, s) / 2,
        conjugate=(lambda y: torch.where(y > 0, y * y / 2, y * y / (2 * s))) if s > 0 else None,
        derivative=lambda a: torch.where(a > 0, torch.ones_like(a), s),
        in_place=lambda a: F.leaky_relu_(a, s),
        monotone=s >= 0,
    )


def elu(alpha: float = 1.0, scale: float = 1.0, name: str | None = None) -> Transfer:
    """Scale · (a for a > 0, alpha · (eᵃ - 1) below)."""
    al, sc = float(alpha), float(scale)

    def function(a: Tensor) -> Tensor:
        return sc * torch.where(a > 0, a, al * torch.expm1(a.clamp(max=0)))

    def integral(a: Tensor) -> Tensor:
        low = a.clamp(max=0)
        return sc * (a.clamp(min=0).square() / 2 + al * (torch.expm1(low) - low))

    return Transfer(
        name or ("elu" if al == sc == 1 else f"elu({al:g}, scale={sc:g})"),
        (lambda a: F.elu(a, al)) if sc == 1 else function,
        integral=integral,
        derivative=lambda a: sc * torch.where(a > 0, 1.0, al * torch.exp(a.clamp(max=0))),
        in_place=(lambda a: F.elu_(a, al)) if sc == 1 else None,
        monotone=al * sc >= 0 and sc >= 0,
    )


def celu(alpha: float = 1.0) -> Transfer:
    """max(a, 0) + min(0, alpha · (e^(a / alpha) - 1)), alpha > 0."""
    al = float(alpha)

    def integral(a: Tensor) -> Tensor:
        low = a.clamp(max=0)
        return a.clamp(min=0).square() / 2 + al * (al * torch.expm1(low / al) - low)

    return Transfer(
        "celu" if al == 1 else f"celu({al:g})",
        lambda a: F.celu(a, al),
        integral=integral,
        derivative=lambda a: torch.where(a > 0, 1.0, torch.exp(a.clamp(max=0) / al)),
        in_place=lambda a: F.celu_(a, al),
    )


def hardtanh(min_val: float = -1.0, max_val: float = 1.0, name: str | None = None) -> Transfer:
    """Pre-activations clipped to [min_val, max_val]; ReLU6 is the case of 0 and 6."""
    lo, hi = float(min_val), float(max_val)

    def integral(a: Tensor) -> Tensor:
        c = a.clamp(lo, hi)
        return c * (a - c / 2)

    return Transfer(
        name or ("hardtanh" if (lo, hi) == (-1, 1) else f"hardtanh({lo:g}, {hi:g})"),
        lambda a: a.clamp(lo, hi),
        integral=integral,
        conjugate=lambda y: torch.where((y >= lo) & (y <= hi), y * y / 2, math.inf),
        derivative=lambda a: ((a > lo) & (a < hi)).to(a.dtype),
        in_place=lambda a: a.clamp_(lo, hi),
    )


def softplus(beta: float = 1.0) -> Transfer:
    """log(1 + e^(beta · a)) / beta, beta > 0."""
    be = float(beta)
    return Transfer(
        "softplus" if be == 1 else f"softplus({be:g})",
        lambda a: F.softplus(a, be),
        integral=lambda a: _softplus_integral(be * a) / be**2,
        derivative=lambda a: torch.sigmoid(be * a),
    )


def _softmax_conjugate(y: Tensor) -> Tensor:
    return _xlogx(y).sum(-1, keepdim=True)


_FIXED = (
    Transfer(
        "identity",
        lambda a: a,
        integral=lambda a: a * a / 2,
        conjugate=lambda y: y * y / 2,
        derivative=torch.ones_like,
        in_place=lambda a: a,
    ),
    Transfer(
        "tanh",
        torch.tanh,
        integral=lambda a: a.abs() + torch.log1p(torch.exp(-2 * a.abs())) - math.log(2),
        conjugate=lambda y: (_xlogx(1 + y) + _xlogx(1 - y)) / 2,
        derivative=lambda a: 1 - torch.tanh(a).square(),
        in_place=_tanh_,
    ),
    Transfer(
        "sigmoid",
        torch.sigmoid,
        integral=lambda a: a.clamp(min=0) + torch.log1p(torch.exp(-a.abs())),
        conjugate=lambda y: _xlogx(y) + _xlogx(1 - y),
        derivative=lambda a: torch.sigmoid(a) * torch.sigmoid(-a),
        in_place=torch.sigmoid_,
    ),
    Transfer(
        "softmax",
        lambda a: torch.softmax(a, -1),
        integral=lambda a: torch.logsumexp(a, -1, keepdim=True),
        conjugate=_softmax_conjugate,
        elementwise=False,
    ),
    Transfer(
        "relu",
        torch.relu,
        integral=lambda a: a.clamp(min=0).square() / 2,
        conjugate=lambda y: torch.where(y >= 0, y * y / 2, math.inf),
        derivative=_step,
        in_place=torch.relu_,
    ),
    Transfer(
        "relu_squared",
        lambda a: a.clamp(min=0).square(),
        integral=lambda a: a.clamp(min=0).pow(3) / 3,
        conjugate=lambda y: torch.where(y >= 0, 2 / 3 * y.clamp(min=0).pow(1.5), math.inf),
        derivative=lambda a: 2 * a.clamp(min=0),
        in_place=lambda a: a.clamp_(min=0).square_(),
    ),
    Transfer(
        "hardsigmoid",
        F.hardsigmoid,
        integral=lambda a: (a + 3).clamp(0, 6) * ((a + 3) - (a + 3).clamp(0, 6) / 2) / 6,
        derivative=lambda a: ((a > -3) & (a < 3)).to(a.dtype) / 6,
    ),
    Transfer(
        "softsign",
        F.softsign,
        integral=lambda a: a.abs() - torch.log1p(a.abs()),
        conjugate=lambda y: torch.where(y.abs() < 1, -y.abs() - torch.log1p(-y.abs()), math.inf),
        derivative=lambda a: (1 + a.abs()).square().reciprocal(),
    ),
    Transfer(
        "logsigmoid",
        F.logsigmoid,
        integral=lambda a: _softplus_integral(-a),
        derivative=lambda a: torch.sigmoid(-a),
    ),
    # Not monotone: no convex integral. They are known so that discovery can say what it met.
    Transfer("gelu", F.gelu, monotone=False),
    Transfer("silu", F.silu, monotone=False),
    Transfer("mish", F.mish, monotone=False),
    Transfer("hardswish", F.hardswish, monotone=False),
)

_registry: dict[str, Transfer] = {
    transfer.name: transfer
    for transfer in (
        *_FIXED,
        leaky_relu(),
        elu(),
        elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946, "selu"),
        celu(),
        hardtanh(),
        hardtanh(0, 6, "relu6"),
        softplus(),
    )
}


def transfer_names() -> list[str]:
    """The names that `get_transfer` knows, sorted."""
    return sorted(_registry)


def get_transfer(transfer: str | Transfer) -> Transfer:
    """The transfer function of that name; a `Transfer` is returned as it is.

    Raises:
        TypeError: Neither a name nor a `Transfer`.
        ValueError: No transfer of that name is registered; the message gives the nearest one.
    """
    if isinstance(transfer, Transfer):
        return transfer
    if not isinstance(transfer, str):
        raise TypeError(
            f"a transfer function must be a name or a torchloco.Transfer, got {type(transfer).__name__}; "
            f"names: {', '.join(transfer_names())}"
        )
    if transfer not in _registry:
        raise ValueError(
            f"unknown transfer function {transfer!r}{nearest(transfer, transfer_names())}; "
            f"known: {', '.join(transfer_names())}. Register your own with torchloco.register_transfer."
        )
    return _registry[transfer]


def add_transfer(transfer: Transfer) -> None:
    """Make a transfer function known by its name.

    Raises:
        TypeError: Not a `Transfer`.
        ValueError: The name is taken.
    """
    if not isinstance(transfer, Transfer):
        raise TypeError(f"register_transfer takes a torchloco.Transfer, got {type(transfer).__name__}")
    if transfer.name in _registry:
        raise ValueError(f"a transfer function named {transfer.name!r} is registered already; choose another name")
    _registry[transfer.name] = transfer


def nearest(name: str, known: list[str]) -> str:
    """A hint for an error message: `` (did you mean 'x'?)``, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
