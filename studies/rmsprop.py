"""What an RMSProp update of the autoencoder's weights costs, in the ways it can be written.

python studies/rmsprop.py > results/rmsprop.txt
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from locobench import problems
from torchloco import RMSProp

THREADS, TIMES = 2, 60
OPTIONS = {"lr": 1e-5, "momentum": 0.999, "decay": 0.9, "epsilon": 1e-5}


def milliseconds(run: Callable[[], object]) -> float:
    """Median of many calls."""
    for _ in range(3):
        run()
    times = []
    for _ in range(TIMES):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return 1000 * median(times)


torch.set_flush_denormal(True)
torch.set_num_threads(THREADS)
weights = list(problems.build("standard", "tanh", 784, seed=0).parameters())
for p in weights:
    p.grad = 1e-3 * torch.randn_like(p)
gradients = [p.grad for p in weights]
squares = [torch.ones_like(p) for p in weights]
sums = [torch.zeros_like(p) for p in weights]


@torch.no_grad()
def lockstep() -> None:
    """All tensors together, by torch._foreach."""
    torch._foreach_mul_(squares, 0.9)
    torch._foreach_addcmul_(squares, gradients, gradients, 0.1)
    roots = torch._foreach_add(squares, 1e-5)
    torch._foreach_sqrt_(roots)
    torch._foreach_mul_(sums, 0.999)
    torch._foreach_addcdiv_(sums, gradients, roots, 1e-5)
    torch._foreach_sub_(weights, sums)


def arithmetic(p: Tensor, g: Tensor, v: Tensor, m: Tensor) -> None:
    """The same for one tensor, to be compiled."""
    v.mul_(0.9).addcmul_(g, g, value=0.1)
    p.sub_(m.mul_(0.999).addcmul_(g, (v + 1e-5).rsqrt(), value=1e-5))


compiled = torch.compile(arithmetic)


@torch.no_grad()
def fused() -> None:
    """Each tensor by a compiled function."""
    for tensors in zip(weights, gradients, squares, sums, strict=True):
        compiled(*tensors)


start = perf_counter()
fused()
first = perf_counter() - start
print(f"ms for all {sum(p.numel() for p in weights)} numbers, {THREADS} threads, torch {torch.__version__}")
print(f"{milliseconds(RMSProp(weights, **OPTIONS).step):6.2f}  torchloco.RMSProp, in blocks")
print(f"{milliseconds(lockstep):6.2f}  torch._foreach over all tensors")
print(f"{milliseconds(fused):6.2f}  torch.compile (the first call took {first:.0f} s)")
