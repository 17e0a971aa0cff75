"""LocoProp against AdamW, Muon and SOAP on an MLP, a CNN, a vision transformer and a character GPT.

    python studies/models.py search cnn adamw,muon,soap,spectral-0.1
    python studies/models.py run cnn adamw,muon 1e-3,3e-3 --seeds 0
    python studies/models.py table
    python studies/models.py prices cnn muon,soap,spectral

A run is a JSON file in results/models/; one that is there is not repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
import typer
from blocks import Blocks
from nets import Problem, build
from torch import nn
from torch.optim import Optimizer

from locobench.memory import peak_bytes, state_bytes
from locobench.pairs import Pair
from locobench.runfile import write_atomically
from locobench.schedules import linear_decay
from locobench.settings import machine, versions
from torchloco import Bounded, Exact, FirstOrderSteps, LocoProp, OuterOptimizer, Spectral

FOLDER = Path(__file__).resolve().parent.parent / "results" / "models"
ROWS = 256  # of the fast local steps
TIMES = "-x"  # between a method and the multiple of the problem's steps that it takes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _soap(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=0.0)


def _muon_layers(model: nn.Module, lr: float) -> Optimizer:
    """The weights of all layers, convolutions' as matrices; the rest to AdamW: the parting that LocoProp has."""
    from pytorch_optimizer import Muon

    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    rest = [p for p in model.parameters() if not any(p is weight for weight in weights)]
    adamw = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return Muon([{"params": weights, "lr": lr, "use_muon": True}, {"params": rest, "use_muon": False, **adamw}])


def _rest(lr: float = 1e-3) -> Callable[[Any], Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=lr)


def _loco(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: LocoProp(model, lr, output="softmax", fallback=_rest(), **options)


def _scaled(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    """The rate is γ; what the solver takes itself as a step stays."""
    return lambda model, lr: LocoProp(model, activation_lr=lr, output="softmax", fallback=_rest(), **options)


def _mlp(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    """Only the linear layers of the transformers' MLPs; attention and the rest go to AdamW."""

    def make(model: nn.Module, lr: float) -> Optimizer:
        chosen = [m for name, m in model.named_modules() if name.endswith(("mlp_in", "mlp_out"))]
        own = {p for m in chosen for p in m.parameters()}
        rest = [p for p in model.parameters() if p not in own]
        params = [{"params": list(own)}, {"params": rest, "fallback": True, "lr": 3e-3}]
        return LocoProp(model, lr, params=params, **options)

    return make


def _spectral(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: LocoProp(model, lr, solver=Spectral(**options), output="softmax", fallback=_rest())


METHODS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr),
    "muon": lambda model, lr: Pair(model, lambda ps: torch.optim.Muon(ps, lr=lr, weight_decay=0.0), _rest()),
    "muon-layers": _muon_layers,
    "soap": _soap,
    "locoprop-m": _loco(activation_lr=100.0, solver=FirstOrderSteps(local_rows=ROWS)),
    "locoprop-s": _loco(activation_lr=100.0, loss="squared", solver=FirstOrderSteps(local_rows=ROWS)),
    "locoprop-m-all": _loco(activation_lr=100.0, solver=FirstOrderSteps(momentum=0.9)),
    "locoprop-m-48": _loco(activation_lr=100.0, solver=FirstOrderSteps(local_rows=48, momentum=0.9)),
    "locoprop-m-48-centered": _loco(
        activation_lr=100.0, solver=FirstOrderSteps(local_rows=48, momentum=0.9, center=True)
    ),
    "locoprop-m-0.9": _loco(activation_lr=100.0, solver=FirstOrderSteps(local_rows=ROWS, momentum=0.9)),
    "locoprop-s-mlp": _mlp(activation_lr=100.0, loss="squared", solver=FirstOrderSteps(local_rows=ROWS)),
    "spectral-1-mlp": _mlp(solver=Spectral(damping=1.0)),
    "blocks": Blocks,
    "spectral": _spectral(damping=0.01),
    "spectral-0.1": _spectral(damping=0.1),
    "spectral-1": _spectral(damping=1.0),
    "spectral-0.1-every-5": _spectral(damping=0.1, average=0.8, every=5),
    "spectral-1-every-5": _spectral(damping=1.0, average=0.8, every=5),
    "exact": _scaled(loss="squared", solver=Exact(1.0, average=0.9)),
    "exact-muon": lambda model, lr: LocoProp(
        model,
        activation_lr=1000.0,
        loss="squared",
        solver=Exact(0.1, average=0.9),
        outer=OuterOptimizer(torch.optim.Muon, lr=lr, weight_decay=0.0, bias_options={"lr": 1e-3}),
        output="softmax",
        fallback=_rest(),
    ),
    "exact-adamw": lambda model, lr: LocoProp(
        model,
        activation_lr=1000.0,
        loss="squared",
        solver=Exact(0.1, average=0.9),
        outer=OuterOptimizer(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        output="softmax",
        fallback=_rest(),
    ),
    "exact-momentum": _scaled(
        loss="squared", solver=Exact(0.1, average=0.9), outer=OuterOptimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    ),
    "exact-bounded": _scaled(loss="squared", solver=Exact(0.1, average=0.9), outer=Bounded(0.02)),
}


# Where the search of each begins.
BEGIN = {
    **{"adamw": 3e-3, "muon": 3e-2, "muon-layers": 3e-2, "soap": 1e-2},
    **{"locoprop": 3e-5, "blocks": 3e-4, "spectral": 1e-2},
}


@app.command()
def run(problem: str, methods: str, lrs: str, seeds: str = "0", threads: int = 1) -> None:
    """Train every combination that has no file yet."""
    prepare(threads)
    for seed in map(int, seeds.split(",")):
        for method in methods.split(","):
            for lr in map(float, lrs.split(",")):
                one(problem, method, lr, seed)


@app.command()
def search(problem: str, methods: str, seeds: str = "0,1,2", threads: int = 1) -> None:
    """The same for every method: rates, then more seeds of the best.

    At least four rates of 1 and 3 times powers of ten, and more until the best has a worse one on each side; then one
    between it and the better of these two.
    """
    prepare(threads)
    first, *others = map(int, seeds.split(","))
    for method in methods.split(","):
        base = method.partition(TIMES)[0]
        begin = BEGIN.get(base) or BEGIN[base.partition("-")[0]]
        middle = 2 * round(2 * math.log10(begin))
        losses = {k: train_loss(one(problem, method, rate(k), first)) for k in (middle, middle + 2)}
        while True:
            best, low, high = min(losses, key=lambda k: losses[k]), min(losses), max(losses)
            if low < best < high and len(losses) >= 4:
                break
            k = low - 2 if best == low or (best < high and best - low < high - best) else high + 2
            losses[k] = train_loss(one(problem, method, rate(k), first))
        between = best + min((-1, 1), key=lambda side: losses[best + 2 * side])
        losses[between] = train_loss(one(problem, method, rate(between), first))
        best = min(losses, key=lambda k: losses[k])
        for seed in others:
            one(problem, method, rate(best), seed)


def rate(k: int) -> float:
    """The k-th of …, 0.01, 0.02, 0.03, 0.05, 0.1, …, which is the -8th; every other one is a 1 or a 3."""
    return float(f"{(1, 2, 3, 5)[k % 4]}e{k // 4}")


def prepare(threads: int) -> None:
    """Settings of torch for every run."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def one(problem: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """The run's row; from its file if it has one. ``muon-x2.5`` takes 2.5 times the problem's steps."""
    path = FOLDER / problem / method / f"{lr:g}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    path.parent.mkdir(parents=True, exist_ok=True)
    task = build(problem, seed)
    base, _, times = method.partition(TIMES)
    result = train(task, METHODS[base], lr, seed, round(task.steps * float(times or 1)))
    row = {"problem": problem, "method": method, "lr": lr, "seed": seed, **result}
    text = json.dumps({**row, "versions": versions(), "machine": machine("cpu")}, allow_nan=False)
    write_atomically(path, lambda file: file.write_text(text + "\n"))
    print(path.relative_to(FOLDER), summary(row), flush=True)
    return row


def train(
    problem: Problem, method: Callable[[nn.Module, float], Optimizer], lr: float, seed: int, steps: int = 0
) -> dict[str, Any]:
    """One training with warm-up and linear decay; it ends early where the loss is not finite."""
    steps = steps or problem.steps
    optimizer = method(problem.model, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_decay(step, steps))
    losses: list[float] = []
    seconds = 0.0
    failure = None
    for (x, y), _ in zip(problem.batches(seed), range(steps), strict=False):
        start = perf_counter()
        optimizer.zero_grad()
        loss = problem.loss(x, y)
        if not math.isfinite(loss.item()):
            failure = "the loss is not finite"
            break
        loss.backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            failure = str(error)
            break
        scheduler.step()
        seconds += perf_counter() - start
        losses.append(round(loss.item(), 5))
    result: dict[str, Any] = {"losses": losses, "seconds": seconds, "failure": failure, "optimizer": repr(optimizer)}
    if hasattr(optimizer, "close"):
        optimizer.close()
    if failure is None:
        problem.model.eval()
        result["test_loss"], result["test_accuracy"] = problem.evaluate(problem.test)
    return result


def train_loss(row: dict[str, Any]) -> float:
    """Mean over the last tenth of the steps; infinite where the run failed."""
    return math.inf if row["failure"] else mean(row["losses"][-max(1, len(row["losses"]) // 10) :])


def summary(row: dict[str, Any]) -> str:
    """Loss of the last tenth of the steps, and what the test images or windows say."""
    if row["failure"]:
        return str(row["failure"])[:60]
    tested = f"test {row['test_loss']:.3f}  {100 * row['test_accuracy']:.1f} %"
    return f"train {train_loss(row):.3f}  {tested}  {row['seconds']:.0f} s"


@app.command()
def prices(problem: str, methods: str, rounds: int = 7, threads: int = 2) -> None:
    """Time and memory of a step ÷ AdamW's, in turns in one process; into results/models/prices-PROBLEM.json."""
    prepare(threads)
    names = ["adamw", *(name for name in methods.split(",") if name != "adamw")]
    steps = {name: _stepper(build(problem, 0), METHODS[name]) for name in names}
    for step, _ in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (step, _) in steps.items():
            start = perf_counter()
            for _ in range(10):  # SOAP renews its factors in every tenth
                step()
            seconds[name].append((perf_counter() - start) / 10)
    path = FOLDER / f"prices-{problem}.json"
    rows = json.loads(path.read_text())["methods"] if path.exists() else {}
    for name, (step, optimizer) in steps.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["adamw"], strict=True)]
        peak = peak_bytes(step, torch.device("cpu"))
        state = state_bytes(optimizer)
        rows[name] = {
            "milliseconds": 1e3 * median(seconds[name]),
            "ratio": median(ratios),
            "state": state,
            "peak": peak,
        }
        print(name, rows[name], flush=True)
    about = {"problem": problem, "threads": threads, "versions": versions(), "machine": machine("cpu"), "methods": rows}
    text = json.dumps(about, indent=1) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def _stepper(problem: Problem, method: Callable[[nn.Module, float], Optimizer]) -> tuple[Callable[[], None], Optimizer]:
    """A function that takes one step on the first batch, always the same one, and the optimizer that it uses."""
    optimizer = method(problem.model, 1e-4)
    x, y = next(problem.batches(0))

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(x, y).backward()
        optimizer.step()

    return step, optimizer


@app.command()
def runs(folder: Path = FOLDER) -> None:
    """Every run."""
    for row in _read(folder):
        print(row["problem"], row["method"], f"{row['lr']:g}", row["seed"], summary(row))


@app.command()
def table(folder: Path = FOLDER) -> None:
    """The tables of docs/models.md: each method at its best rate, best method first."""
    print("\n\n".join(f"{problem}\n\n{text}" for problem, text in tables(folder).items()))


def tables(folder: Path = FOLDER) -> dict[str, str]:
    """Markdown by problem. The rate with the lowest train loss of seed 0 is the best one; further seeds are of that."""
    made = {}
    for problem, rows in _grouped(_read(folder), "problem").items():
        path = folder / f"prices-{problem}.json"
        prices = json.loads(path.read_text())["methods"] if path.exists() else {}
        best = []
        for method, tried in _grouped(rows, "method").items():
            searched = {row["lr"]: train_loss(row) for row in tried if row["seed"] == 0}
            lr = min(searched, key=lambda rate: searched[rate])
            best.append((method, searched, lr, [row for row in tried if row["lr"] == lr]))
        best.sort(key=lambda entry: mean(train_loss(row) for row in entry[3]))
        made[problem] = "\n".join([_HEAD, *(_line(*entry, prices) for entry in best)])
    return made


_HEAD = """| method | best rate | rates | seeds | train | test | accuracy | time ÷ AdamW | state | peak |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def _line(
    method: str,
    searched: dict[float, float],
    lr: float,
    rows: list[dict[str, Any]],
    prices: dict[str, dict[str, float]],
) -> str:
    edge = " (edge)" if len(searched) > 1 and lr in (min(searched), max(searched)) else ""
    losses = [train_loss(row) for row in rows]
    spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
    tested = f"{mean(row['test_loss'] for row in rows):.3f} | {100 * mean(row['test_accuracy'] for row in rows):.1f} %"
    costs = "– | – | –"
    base, _, times = method.partition(TIMES)
    if base in prices:
        price, adamw = prices[base], prices["adamw"]
        time = price["ratio"] * float(times or 1)
        costs = f"{time:.2f} | {price['state'] / adamw['state']:.2f} | {price['peak'] / adamw['peak']:.2f}"
    return (
        f"| {method} | {lr:g}{edge} | {len(searched)} | {len(rows)} | {mean(losses):.3f}{spread} | {tested} | {costs} |"
    )


def _read(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in folder.glob("*/*/*.json")]
    return sorted(rows, key=lambda row: (row["problem"], row["method"], row["lr"], row["seed"]))


def _grouped(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


if __name__ == "__main__":
    app()
