"""The local objective: which loss, target and regularizer each layer's problem is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from torchloco.attached import AttachedLayer
from torchloco.losses import Loss, SquaredLoss
from torchloco.problem import LocalProblem
from torchloco.regularizers import Regularizer
from torchloco.targets import GradientTarget, ModifiedTarget, TargetRule
from torchloco.transfers import Transfer


@dataclass(frozen=True)
class Objective:
    """What all layers' local problems have in common.

    Args:
        loss: The loss.
        target: The rule for the target.
        regularizer: The regularizer, None for none.
    """

    loss: Loss
    target: TargetRule
    regularizer: Regularizer | None

    @property
    def name(self) -> str:
        """What a saved state belongs to: the target's kind, whose γ the param groups hold."""
        names, rule = [], self.target
        while isinstance(rule, ModifiedTarget):
            names.append(type(rule).__name__)
            rule = rule.base
        return " of ".join([*names, getattr(rule, "__name__", type(rule).__name__)])

    def of(self, transfer: Transfer | None) -> tuple[Loss, TargetRule]:
        """Loss and target of a layer with this transfer; the squared ones where the loss does not suit it."""
        if transfer is None or self.loss.suits(transfer):
            return self.loss, self.target
        own = GradientTarget()
        return SquaredLoss(), self.target.of(own) if isinstance(self.target, ModifiedTarget) else own

    def problem(self, layer: AttachedLayer, old: Mapping[Parameter, Tensor]) -> LocalProblem:
        """A layer's local problem at the old weights, made of its rows."""
        rows = layer.rows
        assert rows is not None
        loss, target = self.of(rows.transfer)
        bias = old.get(layer.bias, layer.bias.detach()) if layer.bias is not None else None
        return LocalProblem(
            rows=rows,
            loss=loss,
            target=target,
            regularizer=self.regularizer,
            weight=old[layer.weight],
            bias=bias,
            learn_bias=layer.learn_bias,
            gradients=[p.grad for p in layer.params if p.grad is not None],
        )
