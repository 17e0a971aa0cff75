"""LocoProp's variants."""

from typing import Any

import torch
from torch import nn

from locobench.methods.method import Method
from torchloco import ConjugateGradient, FirstOrderSteps, LocoProp, Spectral, recipes


def _rmsprop_steps(
    model: nn.Module, lr: float, loss: str, momentum: float, activation_lr: float, **solver: Any
) -> LocoProp:
    """LocoProp with the paper's RMSProp in its local steps; where they are on few rows, layers at the same time."""
    steps = FirstOrderSteps(momentum=momentum, **solver)
    parallel = "local_rows" in solver
    return LocoProp(
        model, lr, loss=loss, activation_lr=activation_lr, solver=steps, output="sigmoid", parallel=parallel
    )


LOCOPROP_METHODS = [
    Method(
        "locoprop-m",
        "LocoProp-M",
        lambda model, lr, momentum=0.999, activation_lr=10.0: _rmsprop_steps(
            model, lr, "matching", momentum, activation_lr
        ),
        lr=3e-5,
        searched={"curves": 1e-4},
        cost=7.5,
        note="matching loss, activation lr 10, 10 local steps of RMSProp with momentum 0.999",
    ),
    Method(
        "locoprop-s",
        "LocoProp-S",
        lambda model, lr, momentum=0.999, activation_lr=10.0: _rmsprop_steps(
            model, lr, "squared", momentum, activation_lr
        ),
        lr=1e-4,
        searched={"curves": 3e-4},
        cost=7.5,
        note="squared loss, activation lr 10, 10 local steps of RMSProp with momentum 0.999",
    ),
    Method(
        "locoprop-m-fast",
        "LocoProp-M (fast)",
        lambda model, lr, momentum=0.999, activation_lr=10.0: _rmsprop_steps(
            model, lr, "matching", momentum, activation_lr, local_rows=recipes.FAST_ROWS
        ),
        lr=4e-5,
        searched={"curves": 1e-4},
        cost=2.0,
        note="as locoprop-m, each local step after the first over 48 of the rows, layers at the same time",
    ),
    Method(
        "locoprop-s-fast",
        "LocoProp-S (fast)",
        lambda model, lr, momentum=0.999, activation_lr=10.0: _rmsprop_steps(
            model, lr, "squared", momentum, activation_lr, local_rows=recipes.FAST_ROWS
        ),
        lr=3e-4,
        searched={"curves": 3e-4},
        cost=2.0,
        note="as locoprop-s, each local step after the first over 48 of the rows, layers at the same time",
    ),
    Method(
        "locoprop-m-centered",
        "LocoProp-M (centered)",
        lambda model, lr, momentum=0.998, activation_lr=0.02: recipes.locoprop_m_centered(
            model, lr, activation_lr=activation_lr, momentum=momentum, output="sigmoid"
        ),
        lr=1e-4,
        cost=1.8,
        note="as locoprop-m-normalized, each layer's inputs relative to their mean over the mini-batch",
    ),
    Method(
        "locoprop-m-normalized",
        "LocoProp-M (normalized)",
        lambda model, lr, momentum=0.998, activation_lr=0.02: recipes.locoprop_m_normalized(
            model, lr, activation_lr=activation_lr, momentum=momentum, output="sigmoid"
        ),
        lr=1e-4,
        cost=1.7,
        note="normalized targets at a distance of 0.02 and steps under way follow the schedule; 10 steps, those after "
        "the first over 48 of the rows; momentum 0.998, a metric of the last gradients with decay 0.98",
    ),
    Method(
        "locoprop-s-bf16",
        "LocoProp-S (bfloat16)",
        lambda model, lr, momentum=0.999, activation_lr=10.0: _rmsprop_steps(
            model, lr, "squared", momentum, activation_lr, local_dtype=torch.bfloat16
        ),
        lr=1e-4,
        searched={"curves": 3e-4},
        cost=3.0,
        note="as locoprop-s, local products in bfloat16",
    ),
    Method(
        "locoprop-m-adam",
        "LocoProp-M (Adam)",
        lambda model, lr: LocoProp(model, lr, solver=FirstOrderSteps(torch.optim.Adam), output="sigmoid"),
        lr=1e-4,
        cost=8.5,
        note="matching loss, activation lr 10, 10 local steps of Adam",
    ),
    Method(
        "locoprop-m-anderson",
        "LocoProp-M (Anderson)",
        lambda model, lr: recipes.locoprop_m_anderson(model, lr, output="sigmoid"),
        lr=30.0,
        cost=9.0,
        note="matching loss, 10 gradients with Anderson acceleration of memory 5; the rate is the activation lr",
    ),
    Method(
        "locoprop-s-exact",
        "LocoProp-S (exact)",
        lambda model, lr, damping=1.0: recipes.locoprop_s_exact(model, lr, damping, output="sigmoid"),
        lr=300.0,
        cost=2.5,
        note="squared loss, solved by Cholesky factors, relative damping 1; the rate is the activation lr",
    ),
    Method(
        "locoprop-spectral",
        "LocoProp (spectral)",
        lambda model, lr, momentum=0.95, damping=0.1: LocoProp(
            model, lr, solver=Spectral(momentum, damping=damping), output="sigmoid"
        ),
        lr=1e-2,
        searched={"curves": 0.1},
        cost=4.5,
        note="spectral steps: Nesterov momentum 0.95, relative damping 0.1",
    ),
    Method(
        "locoprop-s-cg",
        "LocoProp-S (CG)",
        lambda model, lr: LocoProp(
            model, activation_lr=lr, loss="squared", solver=ConjugateGradient(10), output="sigmoid"
        ),
        lr=300.0,
        cost=4.5,
        note="squared loss, 10 iterations of conjugate gradients; the rate is the activation lr",
    ),
]
