"""`locobench compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from locobench.choices import DataName
from locobench.commands.options import METHODS_HELP, Act, Device, Model, Threads
from locobench.commands.show import draw
from locobench.errors import BenchError
from locobench.plain_errors import plain_errors


def compare(
    context: typer.Context,
    data: Annotated[
        DataName,
        typer.Option(
            help="Images: curves (drawn here, 20 000, the only one that never needs a network), mnist, "
            "fashion-mnist (60 000 each) or usps (7 291). The folder in $LOCOBENCH_DATA is looked at first, "
            "for mnist.npz, fashion_mnist.npz and usps.npz; else they are downloaded once and verified."
        ),
    ] = "curves",
    model: Model = "standard",
    activation: Act = "tanh",
    methods: Annotated[
        str,
        typer.Option(help=f"Comma-separated, run in this order. {METHODS_HELP}. Example: locoprop-m,adam"),
    ] = "main",
    lr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=VALUE",
            help="Base learning rate of a method instead of its default; may be repeated. "
            "Example: --lr adam=3e-4 --lr sgd=0.01",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE",
            help="Another hyperparameter of a method instead of its default; may be repeated. "
            "Example: --set adam.beta1=0.8",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 6,
    schedule_epochs: Annotated[
        int | None,
        typer.Option(
            help="Length of the learning-rate schedule in epochs: a rise over its first 5 %, then a fall "
            "to 0. Default: --epochs. Longer gives the beginning of a long run, e.g. --epochs 10 "
            "--schedule-epochs 100."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images per step; a last, partial batch of an epoch is dropped.")
    ] = 1000,
    train_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Use only the first N training and at most N test images: for a quick look. Default: all.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the batches, for all methods.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the results; made if missing. Default: runs/DATA-MODEL-ACTIVATION-EPOCHS-seedSEED.",
        ),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="STUDY",
            help="A folder of `locobench tune`: train its methods (or --methods) with their best settings on fresh "
            "seeds, into STUDY/best.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="--tuned: comma-separated, other ones than tune had.")] = "1,2,3",
) -> None:
    """Train the autoencoder with each method; end with a table and two plots.

    Writes METHOD.jsonl per method (its configuration, then a row per epoch), table.md, epochs.png and
    seconds.png. Ctrl-C loses at most the epoch under way: the same command again goes on, and never repeats
    what is finished.

    Example: locobench compare --data mnist --methods locoprop-m,adam --epochs 10

    Example: locobench compare --tuned runs/study --seeds 1,2,3
    """
    with plain_errors(resumable=True):
        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
        if tuned is not None:
            _compare_tuned(tuned, seeds, methods if "methods" in given else None, given)
            return
        if "seeds" in given:
            raise BenchError("--seeds goes with --tuned; use --seed")
        from locobench import compare as job
        from locobench.methods import find_all
        from locobench.settings import Settings, at_least, default_threads

        at_least(1, epochs=epochs)
        console = Console()
        chosen = find_all(methods)
        if "methods" not in given and device == "cpu":  # what nobody asked for is not to take hours
            job.caution(chosen, console, "left out")
            chosen = [method for method in chosen if method.caution is None]
        lrs = job.parse_lrs(lr or [])
        params = job.parse_params(set_ or [])
        for option, named in (("--lr", list(lrs)), ("--set", list(params))):
            idle = [name for name in named if name not in {method.name for method in chosen}]
            if idle:
                raise BenchError(f"{option} is given for {', '.join(idle)}, which --methods leaves out")
        folder = out or Path("runs") / f"{data}-{model}-{activation}-{epochs}-seed{seed}"
        absent = [method for method in chosen if method.missing is not None]
        if len(absent) == len(chosen):
            raise BenchError("; ".join(f"{method.name} is not installed: {method.missing}" for method in absent))
        all_settings = [
            Settings(
                method=method.name,
                lr=lrs.get(method.name, method.rate(data)),
                data=data,
                model=model,
                activation=activation,
                epochs=epochs,
                schedule_epochs=epochs if schedule_epochs is None else schedule_epochs,
                batch_size=batch_size,
                train_size=train_size,
                seed=seed,
                device=device,
                threads=default_threads() if threads is None else threads,
                params=params.get(method.name, {}),
            )
            for method in chosen
            if method not in absent
        ]
        job.compare(all_settings, folder, console)
        draw(folder, absent=absent)


def _compare_tuned(folder: Path, seeds: str, methods: str | None, given: Sequence[str]) -> None:
    others = [name for name in given if name not in ("tuned", "seeds", "methods")]
    if others:
        options = ", ".join("--" + name.strip("_").replace("_", "-") for name in others)
        raise BenchError(f"{options} cannot be given with --tuned: the study decides")
    from locobench.settings import MOST_SEED, whole_numbers

    try:
        from locobench.tuned import compare_tuned
    except ModuleNotFoundError as error:
        raise BenchError(f"--tuned needs {error.name}: pip install optuna sqlalchemy filelock") from None

    compare_tuned(folder, whole_numbers("seeds", seeds, MOST_SEED, smallest=0), methods, Console())
