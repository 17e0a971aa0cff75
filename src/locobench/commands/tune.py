"""`locobench tune`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from locobench.choices import STUDY_METHODS, Activation, DataName, ModelName, TierName
from locobench.errors import BenchError
from locobench.plain_errors import plain_errors


def tune(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--study",
            metavar="DIR",
            help="Folder of the study; made if missing. Default: runs/tune-DATA-MODEL-ACTIVATION-EPOCHS.",
        ),
    ] = None,
    tier: Annotated[
        TierName | None,
        typer.Option(
            help="Presets: smoke (2 trials of 2 epochs of 2 000 curves), short (12 trials of 10 epochs of MNIST), "
            "paper (30 trials of 100 epochs of MNIST). Other options replace parts of it. A new study's default: short."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, the most wanted first, as for compare. Default: the study's own; for a new one "
            f"study: {', '.join(STUDY_METHODS)}."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Per method; the same for all.")] = None,
    data: Annotated[DataName | None, typer.Option(help="Images, as for compare.")] = None,
    model: Annotated[ModelName | None, typer.Option(help="The autoencoder. Default: standard.")] = None,
    activation: Annotated[Activation | None, typer.Option(help="Of its hidden layers. Default: tanh.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of each trial, and the length of its schedule.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step. Default: 1000.")] = None,
    train_size: Annotated[
        int | None, typer.Option(metavar="N", help="Use only the first N training images. Default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and the search. Default: 0.")] = None,
    device: Annotated[str | None, typer.Option(help="Where torch computes. Default: cpu.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each worker. Default: torch's own choice, shared out.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that work on the study at once. The same command in another terminal adds one as well."
        ),
    ] = 1,
    widen: Annotated[
        int,
        typer.Option(
            help="How often the space of a method may grow where its best settings are on the edge; each time it has "
            "as many trials again."
        ),
    ] = 0,
) -> None:
    """Search each method's best settings, with as many trials for every method.

    Writes study.json (the problem and the spaces), study.db (Optuna's), trials/METHOD/NNNN.jsonl (a run file per trial)
    and trials.jsonl (all that have ended). Whatever ends it, the same command continues; it loses at most the
    epoch under way. A study that exists needs no other options than its folder.

    Example: locobench tune --data mnist --methods locoprop-m,adam --epochs 10 --trials 12 --out runs/study

    Then: locobench compare --tuned runs/study
    """
    with plain_errors(resumable=True):
        problem: dict[str, Any] = {
            "data": data,
            "model": model,
            "activation": activation,
            "epochs": epochs,
            "batch_size": batch_size,
        }
        problem |= {"train_size": train_size, "device": device, "threads": threads, "seed": seed, "trials": trials}
        try:
            from locobench import tune as job
        except ModuleNotFoundError as error:
            raise BenchError(f"tune needs {error.name}: pip install optuna sqlalchemy filelock") from None
        from locobench.methods import find_all
        from locobench.settings import at_least
        from locobench.study import TIERS, methods_of, open_study

        at_least(1, workers=workers)
        at_least(0, widen=widen)
        if out is None:
            named = {**TIERS[tier or "short"], **{key: value for key, value in problem.items() if value is not None}}
            parts = [named["data"], model or "standard", activation or "tanh", named["epochs"]]
            out = Path("runs") / "-".join(["tune", *map(str, parts)])
        chosen = find_all(methods or ",".join(methods_of(out)) or "study")
        absent = [method for method in chosen if method.missing is not None]
        if len(absent) == len(chosen):
            raise BenchError("; ".join(f"{method.name} is not installed: {method.missing}" for method in absent))
        study = open_study(out, problem, tier, workers, job.load_images)
        present = [method for method in chosen if method not in absent]
        job.tune(study, present, absent, widen, workers, Console())
