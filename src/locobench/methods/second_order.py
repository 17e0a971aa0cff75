"""Methods that precondition whole matrices."""

from math import inf

import torch
from torch import nn
from torch.optim import Optimizer

from locobench.kfac import KFAC
from locobench.libraries import CURVLINOPS, PYTORCH_OPTIMIZER
from locobench.methods.method import Method
from locobench.pairs import Pair


def _muon(model: nn.Module, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> Optimizer:
    def matrices(params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Muon(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    return Pair(model, matrices, torch.optim.AdamW)


def _soap(model: nn.Module, lr: float, beta1: float = 0.95, beta2: float = 0.95) -> Optimizer:
    made: Optimizer = PYTORCH_OPTIMIZER.load().SOAP(
        model.parameters(), lr=lr, betas=(beta1, beta2), weight_decay=0.0, precondition_frequency=10
    )
    return made


_RMSPROP_GRAFTING = 3  # as in the library's LayerWiseGrafting


def _shampoo(model: nn.Module, lr: float, beta1: float = 0.9, beta2: float = 0.99) -> Optimizer:
    made: Optimizer = PYTORCH_OPTIMIZER.load().ScalableShampoo(
        model.parameters(),
        lr=lr,
        betas=(beta1, beta2),
        start_preconditioning_step=5,
        preconditioning_compute_steps=10,
        graft_type=_RMSPROP_GRAFTING,  # the norm of each step; by default SGD's
    )
    return made


# Of x86 processors those with AVX-512 multiply in bfloat16 at a useful speed, the others element by element.
_SLOW_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX2"

SECOND_ORDER_METHODS = [
    Method(
        "muon",
        "Muon",
        _muon,
        lr=2e-2,
        searched={"curves": 0.3},
        cost=80.0 if _SLOW_BFLOAT16 else 1.6,
        note="torch's, for the weights; momentum 0.95, weight decay 0.1; AdamW with lr 1e-3 for the biases",
        caution="multiplies in bfloat16, which this processor does in software: a step of the standard autoencoder "
        "takes it some 20 s"
        if _SLOW_BFLOAT16
        else None,
    ),
    Method(
        "soap",
        "SOAP",
        _soap,
        lr=3e-3,
        searched={"curves": 1e-2},
        cost=3.0,
        period=10,
        library=PYTORCH_OPTIMIZER,
        note="pytorch_optimizer's; betas 0.95 and 0.95, preconditioners every 10 steps, no weight decay",
    ),
    Method(
        "shampoo",
        "Shampoo",
        _shampoo,
        lr=2e-4,
        searched={"curves": 1e-4},
        cost=3.0,
        period=10,
        library=PYTORCH_OPTIMIZER,
        note="pytorch_optimizer's ScalableShampoo grafted to RMSProp; betas 0.9 and 0.99, preconditioners every 10",
    ),
    Method(
        "kfac",
        "K-FAC",
        lambda model, lr, damping=0.1, momentum=0.9: KFAC(model, lr, damping=damping, momentum=momentum),
        lr=1e-1,
        searched={"curves": 0.3},
        cost=2.0,
        period=10,
        library=CURVLINOPS,
        note="factors and inverses by curvlinops, every 10 steps; damping 0.1, clip 0.01, momentum 0.9",
    ),
    Method(
        "foof-curvlinops",
        "FOOF (curvlinops)",
        lambda model, lr, damping=0.1, momentum=0.9: KFAC(
            model, lr, damping=damping, momentum=momentum, clip=inf, fisher="forward-only"
        ),
        lr=1e-2,
        cost=2.0,
        period=10,
        library=CURVLINOPS,
        note="K-FAC with the input factor alone, by curvlinops, every 10 steps; damping 0.1, momentum 0.9, no clip",
    ),
]
