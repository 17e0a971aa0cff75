"""Cases of data-parallel training, run by several processes at once: python data_parallel.py RANK FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torchloco import (
    Anderson,
    Bounded,
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    LocoProp,
    MomentumTarget,
    Newton,
    NormalizedTarget,
    OuterOptimizer,
    ProximalStep,
    RelativeEntropy,
    Spectral,
    SquaredDistance,
    WeightDecay,
)

WORLD = 2
STEPS = 3
ROWS = (12, 20)  # of each rank


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))


def wide_mlp() -> nn.Module:
    """More inputs than all rows."""
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv1d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose1d(6, 2, 2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Attending(nn.Module):
    """Self-attention over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        return self.head(self.attention(x, x, x)[0].mean(1))


class Crossing(nn.Module):
    """Attention to as many things as there are, or to fewer: the three products then differ in their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.embed(x[..., None])
        memory = self.embed(x[..., None] + 1)[:, : 5 if len(x) == ROWS[0] else 3]
        return self.head(self.attention(q, memory, memory, need_weights=False)[0].mean(1))


class Spread(nn.Module):
    """A transposed convolution of inputs of another size on each rank: the share of zeros in its patches differs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.ConvTranspose1d(1, 4, 3, stride=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if len(x) == ROWS[0] else x[:, :1]
        return self.head(torch.tanh(self.conv(x[:, None])).mean(-1))


class Checkpointed(nn.Module):
    """Recomputed in the backward pass, outside of the wrapper's forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x.detach().requires_grad_(), use_reentrant=True)


class Masked(nn.Module):
    """Some rows have no part in the loss: a different number on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inside(x))) * (x[:, :1] > 0)


class Skipping(nn.Module):
    """A layer that takes no part where it is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.middle, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.skips, self.activation = False, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inside(x))
        return self.head(h if self.skips else self.activation(self.middle(h)))


class Failing(Bounded):
    """An outer rule that may fail, as one that is out of memory does."""

    def __init__(self, fails: bool) -> None:
        super().__init__(1.0)
        self.fails = fails

    def apply(self, *args: Any) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        super().apply(*args)


@dataclass
class Case:
    """What is trained, and how."""

    model: Callable[[], nn.Module] = mlp
    options: dict[str, Any] = field(default_factory=dict)
    early: bool = True  # whether the optimizer is built before the model is wrapped
    passes: int = 1  # per step; only the last one synchronises gradients
    clip: float | None = None


SGD = torch.optim.SGD
CASES = {
    "LocoProp-M": Case(options={"lr": 0.01}),
    "built on the wrapped model": Case(options={"lr": 0.01}, early=False),
    "LocoProp-S": Case(options={"lr": 0.01, "loss": "squared"}),
    "more columns than rows": Case(wide_mlp, {"loss": "squared", "solver": Exact()}),
    "softmax": Case(options={"output": nn.CrossEntropyLoss(), "solver": SGD, "lr": 0.01}),
    "accumulation": Case(options={"lr": 0.01}, passes=3),
    "clipping": Case(options={"solver": SGD, "lr": 0.1}, clip=0.01),
    "masked rows": Case(Masked, {"lr": 0.01}),
    "convolutions": Case(convolutions, {"lr": 0.01}),
    "convolutions, squared": Case(convolutions, {"lr": 0.01, "loss": "squared"}),
    "centered": Case(options={"lr": 0.01, "solver": FirstOrderSteps(center=True)}),
    "centered, squared": Case(options={"lr": 0.01, "loss": "squared", "solver": FirstOrderSteps(center=True)}),
    "centered, convolutions": Case(convolutions, {"lr": 0.01, "solver": FirstOrderSteps(center=True)}),
    "centered, attention": Case(Attending, {"lr": 0.01, "solver": FirstOrderSteps(center=True)}),
    "centered, cross-attention": Case(Crossing, {"lr": 0.01, "solver": FirstOrderSteps(center=True)}),
    "attention": Case(Attending, {"lr": 0.01}),
    "cross-attention": Case(Crossing, {"lr": 0.01}),
    "cross-attention, squared": Case(Crossing, {"lr": 0.01, "loss": "squared"}),
    "cross-attention, exact": Case(Crossing, {"loss": "squared", "solver": Exact(average=0.9)}),
    "cross-attention, spectral": Case(Crossing, {"solver": Spectral(), "lr": 0.05}),
    "inputs of other sizes": Case(Spread, {"lr": 0.01, "loss": "squared", "local_steps": 4}),
    "inputs of other sizes, safe": Case(Spread, {"lr": 0.01, "loss": "squared", "solver": SGD, "safe": True}),
    "re-entrant checkpointing": Case(Checkpointed, {"lr": 0.01}),
    "regularizers": Case(options={"lr": 0.01, "regularizer": SquaredDistance(0.1) + WeightDecay(0.01)}),
    "exponentiated gradient": Case(options={"regularizer": RelativeEntropy(1.0), "solver": ProximalStep()}),
    "normalized targets": Case(options={"lr": 0.01, "target": NormalizedTarget(), "activation_lr": 0.01}),
    "targets with momentum": Case(options={"lr": 0.01, "target": MomentumTarget(0.9)}),
    "exact": Case(options={"loss": "squared", "solver": Exact()}),
    "exact, averaged": Case(options={"loss": "squared", "solver": Exact(average=0.9)}),
    "exact, convolutions": Case(convolutions, {"loss": "squared", "solver": Exact(average=0.9)}),
    "conjugate gradients": Case(options={"loss": "squared", "solver": ConjugateGradient()}),
    "Newton": Case(options={"solver": Newton(), "activation_lr": 1.0}),
    "Newton by conjugate gradients": Case(options={"solver": Newton(direct=0), "activation_lr": 1.0}),
    "Newton on softmax": Case(
        options={"solver": Newton(conjugate_gradients=100), "output": "softmax", "activation_lr": 0.1}
    ),
    "spectral": Case(options={"solver": Spectral(), "lr": 0.05}),
    "spectral, convolutions": Case(convolutions, {"solver": Spectral(), "lr": 0.05}),
    "safe": Case(options={"solver": SGD, "lr": 0.3, "safe": True}),
    "outer": Case(options={"outer": OuterOptimizer(torch.optim.AdamW, lr=0.01)}),
    "bounded": Case(options={"outer": Bounded(0.01)}),
}
# These depend on how the rows are dealt out, as on another order of them.
DEALT = {
    "some rows": Case(options={"lr": 0.01, "solver": FirstOrderSteps(local_rows=8)}),
    "some rows in bfloat16": Case(
        options={"lr": 0.01, "solver": FirstOrderSteps(local_rows=8, local_dtype=torch.bfloat16)}
    ),
    "some rows, convolutions": Case(convolutions, {"lr": 0.01, "solver": FirstOrderSteps(local_rows=8)}),
    "Anderson": Case(options={"solver": Anderson(), "activation_lr": 1.0}),
}


def batches(case: Case, rank: int) -> list[list[tuple[Tensor, Tensor]]]:
    """A list of passes for each step."""
    torch.manual_seed(10 + rank)
    shape = (STEPS, case.passes, ROWS[rank])
    xs, ys = torch.randn(*shape, 5, dtype=torch.float64), torch.randint(3, shape)
    return [list(zip(x, y, strict=True)) for x, y in zip(xs, ys, strict=True)]


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], case: Case) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) / case.passes


def train(case: Case, rank: int) -> dict[str, Any]:
    """One rank's part."""
    model = built(case)
    early = LocoProp(model, **case.options) if case.early else None
    wrapped = DistributedDataParallel(model)
    optimizer = early or LocoProp(wrapped, **case.options)
    for passes in batches(case, rank):
        optimizer.zero_grad()
        with wrapped.no_sync():
            for batch in passes[:-1]:
                loss(wrapped, batch, case).backward()
        loss(wrapped, passes[-1], case).backward()
        finish(model, optimizer, case)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}


def train_alone(case: Case) -> dict[str, Tensor]:
    """The same in one process: the loss is the mean of the ranks' losses."""
    model = built(case)
    optimizer = LocoProp(model, **case.options)
    for of_ranks in zip(*(batches(case, rank) for rank in range(WORLD)), strict=True):
        optimizer.zero_grad()
        for parts in zip(*of_ranks, strict=True):
            total = torch.stack([loss(model, batch, case) for batch in parts]).mean()
            total.backward()
        finish(model, optimizer, case)
    return model.state_dict()


def finish(model: nn.Module, optimizer: LocoProp, case: Case) -> None:
    if case.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    optimizer.step()


def refusals(rank: int) -> dict[str, str]:
    """What each rank is told where one of them, or all, must not step."""
    said = {}
    for name in (
        "input overwritten on one rank",
        "layer unused on one rank",
        "gradients not averaged",
        "another transfer function on one rank",
        "another activation_lr on one rank",
        "an outer rule fails on one rank",
        "no backward",
        "a call beside the wrapper on one rank",
        "fine again",
    ):
        model = built(Case(Skipping))
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = LocoProp(model, outer=Failing(name == "an outer rule fails on one rank" and bool(rank)))
        (x, y), *_ = batches(Case(), rank)[0]
        before = [p.clone() for p in model.parameters()]
        try:
            if name == "input overwritten on one rank":
                F.cross_entropy(wrapped(x), y).backward()
                if rank:
                    x += 1
            elif name == "layer unused on one rank":
                model.skips = bool(rank)
                F.cross_entropy(wrapped(x), y).backward()
            elif name == "gradients not averaged":
                F.cross_entropy(model(x), y).backward()
                for p in model.parameters():
                    dist.all_reduce(p.grad)
            elif name == "another transfer function on one rank":
                model.activation = torch.sigmoid if rank else torch.tanh
                F.cross_entropy(wrapped(x), y).backward()
            elif name == "another activation_lr on one rank":
                optimizer.param_groups[0]["activation_lr"] = 10.0 + rank
                F.cross_entropy(wrapped(x), y).backward()
            elif name == "a call beside the wrapper on one rank":
                F.cross_entropy(wrapped(x), y).backward()
                if rank:
                    model(x)
            elif name == "no backward":
                wrapped(x)
            else:
                F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            said[name] = "stepped"
        except RuntimeError as error:
            said[name] = str(error)
            said[name] += "" if all(map(torch.equal, model.parameters(), before)) else " (but weights changed)"
    model = built(Case(Skipping))
    model.inside = DistributedDataParallel(model.inside)
    optimizer = LocoProp(model)
    F.cross_entropy(model(x), y).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        said["part of the model wrapped"] = str(error)
    wrapped = DistributedDataParallel(built(Case()))
    optimizer = LocoProp(wrapped)  # alive, as its hooks are
    try:
        with wrapped.join():
            loss(wrapped, batches(Case(), rank)[0][0], Case())
    except RuntimeError as error:
        said["joined"] = str(error)
    optimizer.close()
    sharded = built(Case())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
    try:
        LocoProp(sharded)
    except ValueError as error:
        said["sharded weights"] = str(error)
    return said


def goes_on_alone(rank: int) -> str:
    """One rank uses the bare model afterwards, with a layer that takes no part any more."""
    model = built(Case(Skipping))
    wrapped, optimizer = DistributedDataParallel(model), LocoProp(model)
    (x, y), *_ = batches(Case(), rank)[0]
    F.cross_entropy(wrapped(x), y).backward()
    optimizer.step()
    if rank == 0:
        model.skips = True
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return "stepped"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {name: train(case, rank) for name, case in {**CASES, **DEALT}.items()}
    results["refusals"] = refusals(rank)
    results["alone"] = goes_on_alone(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
