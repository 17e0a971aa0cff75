"""What solving layers at the same time gains: python studies/parallel.py > FILE (machine otherwise idle)"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locobench import problems
from torchloco import LocoProp, recipes

ROUNDS, STEPS = 10, 3
torch.set_flush_denormal(True)
torch.set_num_threads(2)


def autoencoder() -> nn.Module:
    """The standard one."""
    return problems.build("standard", "tanh", 784, seed=0)


def square(width: int) -> Callable[[], nn.Module]:
    """A builder of four layers of one width."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        modules = [module for _ in range(4) for module in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*modules[:-1])

    return build


def fast(model: nn.Module, parallel: bool) -> Optimizer:
    """LocoProp-M on 48 rows."""
    return recipes.locoprop_m(model, 4e-5, paper=False, output="sigmoid", parallel=parallel)


def normalized(model: nn.Module, parallel: bool) -> Optimizer:
    """The same with normalized targets."""
    return recipes.locoprop_m_normalized(model, output="sigmoid", parallel=parallel)


def all_rows(model: nn.Module, parallel: bool) -> Optimizer:
    """The paper's."""
    return LocoProp(model, output="sigmoid", parallel=parallel)


def squared(model: nn.Module, parallel: bool) -> Optimizer:
    """The paper's LocoProp-S."""
    return LocoProp(model, loss="squared", output="sigmoid", parallel=parallel)


def exact(model: nn.Module, parallel: bool) -> Optimizer:
    """LocoProp-S, solved exactly."""
    return recipes.locoprop_s_exact(model, 1.0, output="sigmoid", parallel=parallel)


def seconds(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> float:
    """Those of one training step."""
    began = perf_counter()
    optimizer.zero_grad()
    problems.loss(model(batch), batch).backward()
    optimizer.step()
    return perf_counter() - began


def compare(name: str, build: Callable[[], nn.Module], rows: int, make: Callable[[nn.Module, bool], Optimizer]) -> None:
    """Print milliseconds per step of Adam, of one layer after the other, and of layers at the same time."""
    models = [build() for _ in range(3)]
    batch = torch.rand(rows, next(models[0].parameters()).shape[1], generator=torch.Generator().manual_seed(0))
    optimizers = [torch.optim.Adam(models[0].parameters()), make(models[1], False), make(models[2], True)]
    taken: list[list[float]] = [[], [], []]
    for turn in range(ROUNDS):
        for model, optimizer, times in zip(models, optimizers, taken, strict=True):
            found = [seconds(model, optimizer, batch) for _ in range(STEPS)]
            times += found if turn else []  # the first warms up
    adam, one, several = (median(times) * 1e3 for times in taken)
    print(
        f"{name:36} {adam:8.1f} {one:8.1f} {several:8.1f} {one / adam:8.2f} {several / adam:8.2f} {several / one:8.3f}"
    )


print(f"ms per step, medians of {(ROUNDS - 1) * STEPS} steps in turns, 2 threads, torch {torch.__version__}")
columns = ("Adam", "in turn", "at once", "÷ Adam", "÷ Adam", "at once ÷")
print(f"{'':36} " + " ".join(f"{column:>8}" for column in columns))
for solver in (normalized, fast, all_rows, squared, exact):
    compare(f"autoencoder, batch 1000, {solver.__name__}", autoencoder, 1000, solver)
for width, size in ((64, 64), (128, 100), (256, 250), (512, 500), (1024, 1000)):
    compare(f"4 layers of {width}, batch {size}, fast", square(width), size, fast)
