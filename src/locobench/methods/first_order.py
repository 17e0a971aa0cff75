"""Methods whose steps need gradients and little else."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from locobench.libraries import SCHEDULEFREE
from locobench.methods.method import Method
from locobench.schedules import constant
from torchloco import RMSProp


def _schedule_free(model: nn.Module, lr: float, beta1: float = 0.9, beta2: float = 0.999) -> Optimizer:
    optimizer: Any = SCHEDULEFREE.load().AdamWScheduleFree(model.parameters(), lr=lr, betas=(beta1, beta2))
    optimizer.train()
    made: Optimizer = optimizer
    return made


FIRST_ORDER_METHODS = [
    Method(
        "sgd",
        "SGD",
        lambda model, lr: torch.optim.SGD(model.parameters(), lr),
        lr=1e-2,
        searched={"curves": 3e-2},
        note="no momentum",
    ),
    Method(
        "momentum",
        "Momentum",
        lambda model, lr, momentum=0.9: torch.optim.SGD(model.parameters(), lr, momentum=momentum),
        lr=3e-3,
        searched={"curves": 3e-3},
        note="momentum 0.9",
    ),
    Method(
        "nesterov",
        "Nesterov",
        lambda model, lr, momentum=0.9: torch.optim.SGD(model.parameters(), lr, momentum=momentum, nesterov=True),
        lr=3e-3,
        searched={"curves": 3e-3},
        note="momentum 0.9",
    ),
    Method(
        "adagrad",
        "AdaGrad",
        lambda model, lr: torch.optim.Adagrad(model.parameters(), lr),
        lr=1e-2,
        searched={"curves": 3e-3},
        note="accumulator starts at 0",
    ),
    Method(
        "rmsprop",
        "RMSProp",
        lambda model, lr, decay=0.9, momentum=0.0: torch.optim.RMSprop(
            model.parameters(), lr, alpha=decay, momentum=momentum
        ),
        lr=3e-4,
        searched={"curves": 1e-3},
        note="torch's; decay 0.9, no momentum",
    ),
    Method(
        "rmsprop-tf",
        "RMSProp (TF)",
        lambda model, lr, decay=0.9, momentum=0.9: RMSProp(
            model.parameters(), lr, decay=decay, momentum=momentum, epsilon=1e-5
        ),
        lr=3e-4,
        searched={"curves": 1e-3},
        note="TensorFlow's arithmetic; decay 0.9, momentum 0.9, epsilon 1e-5",
    ),
    Method(
        "adam",
        "Adam",
        lambda model, lr, beta1=0.9, beta2=0.999: torch.optim.Adam(model.parameters(), lr, betas=(beta1, beta2)),
        lr=1e-3,
        searched={"curves": 1e-2},
        note="betas 0.9 and 0.999",
    ),
    Method(
        "adamw",
        "AdamW",
        lambda model, lr, beta1=0.9, beta2=0.999: torch.optim.AdamW(model.parameters(), lr, betas=(beta1, beta2)),
        lr=1e-3,
        searched={"curves": 1e-2},
        note="betas 0.9 and 0.999, weight decay 0.01",
    ),
    Method(
        "nadam",
        "NAdam",
        lambda model, lr, beta1=0.9, beta2=0.999: torch.optim.NAdam(model.parameters(), lr, betas=(beta1, beta2)),
        lr=1e-3,
        searched={"curves": 1e-2},
        note="betas 0.9 and 0.999",
    ),
    Method(
        "schedule-free",
        "ScheduleFree AdamW",
        _schedule_free,
        lr=2.5e-3,
        schedule=constant,
        library=SCHEDULEFREE,
        note="schedulefree's; betas 0.9 and 0.999, warm-up without decay, evaluated at the averaged weights",
    ),
]
