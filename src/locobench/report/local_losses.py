"""The local losses that transfer functions induce, computed by the library's own losses, for the page's slider."""

from functools import cache
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from locobench.report.charts import layout
from locobench.unit_loss import unit_losses
from torchloco import MatchingLoss, PostActivationLoss, SquaredLoss, get_transfer
from torchloco.losses import Loss

TRANSFERS = ("tanh", "relu", "sigmoid", "leaky_relu", "elu", "softplus")
START = ("tanh", 1.5)  # transfer and target that the page opens with
LINES = {
    "matching": ("matching loss (LocoProp-M)", "#D55E00", "solid"),
    "squared": ("squared loss (LocoProp-S)", "#0072B2", "dash"),
    "post": ("squared loss behind the transfer", "#777777", "dot"),
}


@cache
def table() -> dict[str, Any]:
    """Of each transfer and target the losses of all predictions; targets and predictions are pre-activations."""
    predictions = torch.linspace(-4, 4, 81, dtype=torch.float64)
    targets = torch.linspace(-3, 3, 61, dtype=torch.float64)
    return {
        "predictions": _short(predictions),
        "targets": _short(targets),
        "squared": [_values(SquaredLoss(), "identity", predictions, target) for target in targets.tolist()],
        "transfers": {
            name: {
                "matching": [_values(MatchingLoss(), name, predictions, target) for target in targets.tolist()],
                "post": [_values(PostActivationLoss(), name, predictions, target) for target in targets.tolist()],
            }
            for name in TRANSFERS
        },
    }


def _values(loss: Loss, name: str, predictions: Tensor, target: float) -> list[float]:
    return _short(unit_losses(loss, get_transfer(name), predictions, target))


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") + 0.0 for value in values.tolist()]


def figure(losses: dict[str, Any]) -> go.Figure:
    """The losses for the transfer and target of `START`; the page replaces them.

    Args:
        losses: What `table` gave.
    """
    name, target = START
    index = losses["targets"].index(target)
    values = {"squared": losses["squared"][index], **{k: v[index] for k, v in losses["transfers"][name].items()}}
    drawn = go.Figure(layout=layout("predicted pre-activation", "local loss"))
    for key, (title, colour, dash) in LINES.items():
        drawn.add_trace(
            go.Scatter(
                x=losses["predictions"],
                y=values[key],
                mode="lines",
                name=title,
                line={"color": colour, "dash": dash, "width": 3 if key == "matching" else 2},
                hovertemplate=f"<b>{title}</b><br>at %{{x:.1f}}: %{{y:.3g}}<extra></extra>",
                meta={"kind": key},
            )
        )
    drawn.add_trace(
        go.Scatter(
            x=[target],
            y=[0],
            mode="markers",
            name="target",
            marker={"size": 15, "color": "#222222", "symbol": "diamond", "line": {"color": "white", "width": 1.5}},
            hovertemplate="target %{x:.1f}<extra></extra>",
            meta={"kind": "target"},
            cliponaxis=False,
        )
    )
    drawn.update_yaxes(range=[-0.15, 5])
    drawn.update_xaxes(range=[-4, 4])
    return drawn
