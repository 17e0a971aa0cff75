"""What the tests of the benchmark share."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from locobench import runs
from locobench.data import Images
from locobench.settings import Settings


@pytest.fixture(autouse=True)
def leave_torch_as_it_was() -> Iterator[None]:
    """A run sets torch's threads, seeds its global generator and flushes subnormal numbers."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.set_flush_denormal(False)


STUDY = Settings(
    method="adam",
    lr=1e-3,
    data="curves",
    model="standard",
    activation="tanh",
    epochs=3,
    schedule_epochs=3,
    batch_size=20,
    train_size=40,
    seed=1,
    device="cpu",
    threads=1,
)
BEST = {"locoprop-m": 1e-3, "adam": 1e-3, "rmsprop": 3e-4, "sgd": 1e-2}
TRIED = [("locoprop-m", 1e-3), ("locoprop-m", 1e-4), ("adam", 1e-3), ("adam", 1e-2), ("sgd", 1e-2), ("sgd", 1e36)]
PRICES = {"locoprop-m": (7.5, 1.0), "adam": (1.0, 1.0), "sgd": (0.9, 0.0)}


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of real runs on tiny images, laid out as `tune` and `compare --tuned` do; not to be changed."""
    folder = tmp_path_factory.mktemp("studies") / "study"
    pixels = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    images = Images(pixels[:40], pixels[40:], (4, 4))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for seed in (1, 2):
        for method, lr in BEST.items():
            target = folder / "best" / str(seed)
            target.mkdir(parents=True, exist_ok=True)
            runs.carry_out(replace(STUDY, method=method, lr=lr, seed=seed), images, target)
    rows = []
    for number, (method, lr) in enumerate(TRIED):
        target = folder / "trials" / method
        target.mkdir(parents=True, exist_ok=True)
        run = runs.carry_out(replace(STUDY, method=method, lr=lr, seed=0, epochs=1), images, target)
        file = run.path.replace(target / f"{number:04}.jsonl")
        last = run.rows[-1]
        rows.append(
            {
                "method": method,
                "trial": number,
                "state": "diverged" if run.diverged else "pruned" if number == 1 else "finished",
                "lr": lr,
                "params": {},
                "train_loss": last["train_loss"],
                "test_loss": last["test_loss"],
                "epochs": len(run.rows),
                "seconds": last["seconds"],
                "file": file.relative_to(folder).as_posix(),
            }
        )
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("data", "model", "activation", "epochs", "batch_size", "train_size", "device", "threads", "protocol")
    info = {key: getattr(STUDY, key) for key in keys}
    info |= {"seed": 0, "trials": 2, "sampler": "by hand", "pruner": "by hand", "widened": {}}
    info["spaces"] = {method: {"lr": [1e-5, 1]} for method in BEST}
    (folder / "study.json").write_text(json.dumps(info))
    sizes = {"width": 1, "depth": 1, "batch_size": 20}
    prices = [{**sizes, "method": m, "time_ratio": time, "bytes_ratio": held} for m, (time, held) in PRICES.items()]
    (folder / "speed.json").write_text(json.dumps({"prices": prices}))
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupted; not to be changed."""
    from searches import search  # needs the libraries of the search

    folder = tmp_path_factory.mktemp("whole")
    search(folder, "sgd,adam")
    return folder


@pytest.fixture
def study(finished_study: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished_study, tmp_path / "study")
