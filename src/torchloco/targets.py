"""The target of a local problem: where a layer's prediction should go, given one forward and one backward pass.

A target is any callable that maps `LayerRows` to a tensor of shape (N, d_out). Targets that derive from `Target` say
how they are made from the back-propagated gradient: where the residual at the old weights is a known multiple of G, the
first local gradient is the one autograd has computed already.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchloco.checks import check_range
from torchloco.inputs import Dense, Inputs
from torchloco.losses import Loss, MatchingLoss, SquaredLoss
from torchloco.transfers import Transfer


@dataclass
class LayerRows:
    """What one forward and one backward pass left at a layer, as a matrix problem.

    Args:
        name: The layer's name in the model.
        inputs: X, the rows that entered, as a linear map or as a matrix (N, d_in).
        a: A = X Wᵀ + b, the pre-activations at the old weights, (N, d_out).
        g: G = ∂L/∂A, the network loss's gradient at the pre-activations, (N, d_out); a mean's 1/N is in it.
        transfer: The layer's transfer function f.
        activation_lr: γ, the activation learning rate.
        memory: What a target has kept of this layer from earlier mini-batches, by name. Not to be written to.
        keep: What it wants to find there next time. Taken over, and saved with the optimizer, when the step succeeds.
            Loading moves tensors to the weight's device and changes nothing else.
        lr_factor: What lr is relative to its highest so far; 1 where the solver scales its displacement by that.
    """

    name: str
    inputs: Inputs
    a: Tensor
    g: Tensor
    transfer: Transfer
    activation_lr: float
    memory: Mapping[str, Any] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Tensor):
            self.inputs = Dense(self.inputs)

    @property
    def x(self) -> Tensor:
        """X as a matrix, (N, d_in); of a convolution all patches, laid out anew. (g, N, d_in) where it has g groups."""
        return self.inputs.dense()

    @cached_property
    def y(self) -> Tensor:
        """Y = f(A), the post-activations, (N, d_out)."""
        return self.transfer.apply_(self.a.clone())


TargetRule = Callable[[LayerRows], Tensor]


class Target(ABC):
    """A target made from the back-propagated gradient: T = center - scale · direction.

    Yours needs `loss` and `center`; it may change `scale` and `direction`. Where `direction`, `__call__` or another
    target's `center` is overridden, `along_gradient` is False unless the class says otherwise.
    """

    #: The loss whose residual at the old weights is scale · direction with this target.
    loss: type[Loss]
    #: Whether `direction` is G itself, so that the first local gradient is a multiple of autograd's.
    along_gradient: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = [base for base in cls.__mro__[1:] if "center" in base.__dict__]
        replaced = "center" in cls.__dict__ and bool(inherited) and inherited[0] is not Target
        if "along_gradient" not in cls.__dict__ and (replaced or {"direction", "__call__"} & set(cls.__dict__)):
            cls.along_gradient = False

    @abstractmethod
    def center(self, rows: LayerRows) -> Tensor:
        """The target that asks for no change, (N, d_out), as a tensor that may be written to."""

    def scale(self, rows: LayerRows) -> float:
        """What the direction is multiplied by: γ."""
        return rows.activation_lr

    def direction(self, rows: LayerRows) -> Tensor:
        """What is subtracted, (N, d_out): G."""
        return rows.g

    def __call__(self, rows: LayerRows) -> Tensor:
        """The target T, (N, d_out)."""
        return self.center(rows).sub_(self.direction(rows), alpha=self.scale(rows))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class GradientTarget(Target):
    """T = A - γG, one gradient-descent step on the pre-activations; goes with `SquaredLoss` (LocoProp-S)."""

    loss = SquaredLoss

    def center(self, rows: LayerRows) -> Tensor:
        """A."""
        return rows.a.clone()


class MirrorTarget(Target):
    """T = f(A) - γG, one mirror-descent step; goes with `MatchingLoss` (LocoProp-M).

    The gradient at the PRE-activation is subtracted from the post-activation: a step in the dual space of F.
    """

    loss = MatchingLoss

    def center(self, rows: LayerRows) -> Tensor:
        """f(A)."""
        return rows.transfer.apply_(rows.a.clone())  # not the cached rows.y, so that it can be overwritten


class ModifiedTarget(Target):
    """Another target with a changed scale or direction.

    Args:
        base: The target that is changed; default: the one that goes with the loss.

    Raises:
        TypeError: `base` is not a `Target`.
    """

    def __init__(self, base: Target | None = None) -> None:
        if base is not None and not isinstance(base, Target):
            raise TypeError(f"{type(self).__name__} changes a Target such as MirrorTarget(), got {base!r}")
        self._base = base

    @property
    def base(self) -> Target:
        """The target that is changed."""
        if self._base is None:
            raise ValueError(f"{self!r} changes no target yet; give it one, such as base=MirrorTarget()")
        return self._base

    @property
    def loss(self) -> type[Loss]:  # type: ignore[override]
        """The base's."""
        return self.base.loss

    @property
    def along_gradient(self) -> bool:  # type: ignore[override]
        """The base's."""
        return self.base.along_gradient

    def of(self, base: Target, *, replace: bool = True) -> ModifiedTarget:
        """The same change of another target, innermost; unless `replace`, only where none was given."""
        changed = copy.copy(self)
        if isinstance(self._base, ModifiedTarget):
            changed._base = self._base.of(base, replace=replace)
        elif self._base is None or replace:
            changed._base = base
        return changed

    def center(self, rows: LayerRows) -> Tensor:
        """The base's."""
        return self.base.center(rows)

    def scale(self, rows: LayerRows) -> float:
        """The base's."""
        return self.base.scale(rows)

    def direction(self, rows: LayerRows) -> Tensor:
        """The base's."""
        return self.base.direction(rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self._base is None else repr(self._base)})"


class NormalizedTarget(ModifiedTarget):
    """T = center - γ · G / rms(G): γ is how far the targets are on average, and nothing else.

    It does not depend on the batch size, on a mean or a sum in the network's loss, or on a gradient scaler. The root
    mean square is taken over all units and those rows that have a gradient, so padding changes nothing. Set
    `activation_lr` to about 0.01 with it: the paper's γ = 10 begins at 0.001 (first layer) to 0.006 (code) in these
    units, on the deep autoencoder. Above 1 it warns.

    Args:
        base: The target that is changed; default: the one that goes with the loss.
        follow_lr: Whether γ follows lr down from the highest that a scheduler has made of it. The paper's targets come
            closer by themselves as G shrinks; these do not, and the last ones should not ask for as much as the first.
            Nothing follows with solvers without use for lr, whose displacement is scaled in its stead.

    Raises:
        TypeError: `base` is not a `Target`, or `follow_lr` no bool.
        ValueError: `base` is normalized already.
    """

    def __init__(self, base: Target | None = None, *, follow_lr: bool = False) -> None:
        super().__init__(base)
        if not isinstance(follow_lr, bool):
            raise TypeError(f"follow_lr must be True or False, got {follow_lr!r}")
        inner = base
        while isinstance(inner, ModifiedTarget):
            if isinstance(inner, NormalizedTarget):
                raise ValueError(f"{base!r} is normalized already; give NormalizedTarget the target inside of it")
            inner = inner._base
        self.follow_lr = follow_lr

    def scale(self, rows: LayerRows) -> float:
        """γ / rms(G), times the scheduler's factor if it follows lr."""
        direction = self.base.direction(rows).to(torch.promote_types(rows.g.dtype, torch.float32))
        inputs = rows.inputs
        if rows.activation_lr > 1:
            warnings.warn(
                f"activation_lr = {rows.activation_lr:g} with NormalizedTarget asks pre-activations to change by that "
                "much on average; about 0.01 is usual",
                stacklevel=2,
            )
        of_rows, unit = torch.linalg.vector_norm(direction, dim=1), 1.0
        squares = float(inputs.total(of_rows.double().square().sum()))
        if not 1e-20 < squares < 1e20:
            # Squares of small gradients are lost, those of large ones too large; relative to the largest they are not.
            unit = float(inputs.largest(direction.abs().amax() if len(direction) else direction.new_zeros(())))
            numbers = torch.finfo(direction.dtype)
            if unit < numbers.tiny / numbers.eps:  # nothing but rounding, which is not to be blown up
                return 0.0
            of_rows = torch.linalg.vector_norm(direction / unit, dim=1)
            squares = float(inputs.total(of_rows.double().square().sum()))
        # A row is without a gradient only where no number of it is left, even if their squares are.
        lost = direction[of_rows == 0].any(dim=1).sum()
        active = int(inputs.total((of_rows != 0).sum() + lost))
        factor = rows.lr_factor if self.follow_lr else 1.0
        return factor * self.base.scale(rows) / (unit * math.sqrt(squares / (active * direction.shape[1])))

    def __repr__(self) -> str:
        parts = [] if self._base is None else [repr(self._base)]
        return f"{type(self).__name__}({', '.join([*parts, *(['follow_lr=True'] if self.follow_lr else [])])})"


class MomentumTarget(ModifiedTarget):
    """T = center - γ · (G + β·s/N), with s a decayed sum of each unit's past activation gradients: s ← β·s + Σ_rows G.

    Rows of other mini-batches are other examples, so what is kept is one number per unit. Each bias thus sees the
    gradient of SGD with momentum β exactly, and so does the weight of a unit whose input is constant.

    Args:
        momentum: β, in [0, 1).
        base: The target that is changed; default: the one that goes with the loss.
    """

    along_gradient = False

    def __init__(self, momentum: float = 0.9, base: Target | None = None) -> None:
        super().__init__(base)
        check_range("momentum", momentum, 0, 1, inclusive=True)
        self.momentum = float(momentum)

    def direction(self, rows: LayerRows) -> Tensor:
        """G + β·s/N."""
        direction = self.base.direction(rows)
        now = rows.inputs.total(direction.sum(0))
        past = rows.memory.get("momentum")
        if past is not None:
            past = past.to(now)
        rows.keep["momentum"] = now if past is None else past * self.momentum + now
        return direction if past is None else direction + past * (self.momentum / max(1, rows.inputs.all_rows))

    def __repr__(self) -> str:
        base = "" if self._base is None else f", {self._base!r}"
        return f"MomentumTarget({self.momentum:g}{base})"


def target_of(loss: Loss) -> Target | None:
    """The target that goes with a loss, if one does."""
    kinds = (MirrorTarget, GradientTarget)
    return next((kind() for kind in kinds if kind.loss is type(loss)), None)


def known_gradient_scale(rows: LayerRows, loss: Loss, target: TargetRule) -> float | None:
    """S where the residual at the old weights is s·G by construction, None where it must be computed.

    True for each gradient-made target with its own loss; with the identity transfer the squared and the matching loss
    are the same, and so are their targets.
    """
    if not isinstance(target, Target) or not target.along_gradient:
        return None
    made_for_it = type(loss) is target.loss
    same_for_identity = rows.transfer.name == "identity" and {type(loss), target.loss} <= {SquaredLoss, MatchingLoss}
    return target.scale(rows) if made_for_it or same_for_identity else None
