"""The `locobench` command. What it imports at once is light: `--help` should not wait for torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from locobench import __version__, cli_report
from locobench.choices import MAIN_METHODS, MORE_METHODS, SPEED_ONLY, Activation, DataName, FigureName, ModelName
from locobench.errors import BenchError
from locobench.plain_errors import plain_errors as _plain_errors
from locobench.tune_command import tune

if TYPE_CHECKING:
    from locobench.methods import Method

METHODS_HELP = (
    f"{', '.join(MAIN_METHODS)} (together: main); others: {', '.join(MORE_METHODS)}; all for both, study for those "
    "that tune searches unless told otherwise"
)

app = typer.Typer(
    name="locobench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Trains a deep autoencoder with LocoProp and with the usual optimizers, on the same initial weights "
    "and batches, and compares them by epoch, by second and by byte.\n\n"
    "Start with `locobench compare`: it needs no download and ends with a table and two plots.",
)

Model = Annotated[
    ModelName,
    typer.Option(
        help="The autoencoder: standard (784-1000-500-250-30 and back, 2.8 million parameters), deep (its "
        "500 layers three times), wide and wide4 (all hidden widths times 2 or 4)."
    ),
]
Act = Annotated[Activation, typer.Option(help="Activation of the hidden layers; code and output are linear.")]
Device = Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1 or mps.")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of torch. Default: torch's own choice. The losses' last digits depend on it."),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Show the version, or nothing: the commands do the work."""
    if version:
        typer.echo(f"locobench {__version__}")
        raise typer.Exit


@app.command()
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
    with _plain_errors(resumable=True):
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
        chosen = find_all(methods)
        lrs = job.parse_lrs(lr or [])
        params = job.parse_params(set_ or [])
        for option, given in (("--lr", list(lrs)), ("--set", list(params))):
            idle = [name for name in given if name not in {method.name for method in chosen}]
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
        job.compare(all_settings, folder, Console())
        _show(folder, absent=absent)


def _compare_tuned(folder: Path, seeds: str, methods: str | None, given: Sequence[str]) -> None:
    others = [name for name in given if name not in ("tuned", "seeds", "methods")]
    if others:
        options = ", ".join("--" + name.strip("_").replace("_", "-") for name in others)
        raise BenchError(f"{options} cannot be given with --tuned: the study decides")
    from locobench.settings import whole_numbers

    try:
        from locobench.tuned import compare_tuned
    except ModuleNotFoundError as error:
        raise BenchError(f"--tuned needs {error.name}: pip install optuna sqlalchemy filelock") from None

    compare_tuned(folder, whole_numbers("seeds", seeds), methods, Console())


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run files (*.jsonl), or of folders.")],
    best: Annotated[bool, typer.Option("--best", help="Only the best run of each method, as after a search.")] = False,
    speed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of `locobench speed`: take prices from it, not from the runs."),
    ] = None,
) -> None:
    """Draw the table and the plots of a folder of runs again, from its files alone.

    Works during a comparison as well: it shows what is finished so far.

    Example: locobench show runs/curves-standard-tanh-6-seed0
    """
    with _plain_errors():
        _show(folder, best=best, speed=speed)


@app.command()
def figure(
    name: Annotated[
        FigureName,
        typer.Argument(
            help="local-losses: the losses that transfer functions induce. second-order: how the update of one "
            "mini-batch compares with FOOF, K-FAC and Gauss-Newton as the local steps grow. speed: what a step costs "
            "against width, depth or batch size."
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="speed: the JSON that `locobench speed` wrote.")
    ] = None,
    transfers: Annotated[
        str, typer.Option(help="local-losses: comma-separated transfer functions, one panel each.")
    ] = "tanh,relu",
    data: Annotated[DataName, typer.Option(help="second-order: the images, as for compare.")] = "curves",
    warm_up: Annotated[
        int, typer.Option(help="second-order: steps of training before the second of its two points; 0 for one point.")
    ] = 120,
    damping: Annotated[
        str,
        typer.Option(help="second-order: up to three values, each relative to the mean diagonal of what is damped."),
    ] = "1,0.1",
    batch_size: Annotated[int, typer.Option(help="second-order: images per step.")] = 1000,
    seed: Annotated[int, typer.Option(help="second-order: of initial weights, batches and sampled labels.")] = 0,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="The PNG. Default: runs/NAME.png.")] = None,
) -> None:
    """Draw a figure about the method.

    local-losses shows a layer's loss as a function of its predicted pre-activation, for a few targets, next to the
    squared loss; computed by the library's own losses.

    second-order measures, for each layer of the standard autoencoder, the cosine between LocoProp's update and
    second-order directions for 1 to 50 local steps, and writes all numbers to a JSON file next to the PNG. It takes
    about a quarter of an hour on one CPU core.

    speed draws the plot of `locobench speed` again, from its file alone.

    Example: locobench figure local-losses --transfers tanh,relu,sigmoid

    Example: locobench figure second-order --data mnist

    Example: locobench figure speed runs/speed.json --out cost.png
    """
    path = out or Path("runs") / f"{name}.png"
    with _plain_errors():
        if (file is None) == (name == "speed"):
            raise BenchError("figure speed needs the FILE that `locobench speed` wrote; the other figures take none")
        if file is not None:
            written = [_cost(file, path)]
        elif name == "local-losses":
            from locobench import figures

            written = [figures.local_losses([part.strip() for part in transfers.split(",")], path)]
        else:
            written = _second_order(data, warm_up, damping, batch_size, seed, threads, path)
        for made in written:
            typer.echo(f"written: {made}")


def _cost(file: Path, path: Path) -> Path:
    from locobench import cost_plot, prices
    from locobench.runfile import prepare_folder

    if path.is_dir() or path.suffix.lower() == ".json":
        raise BenchError(f"--out must name the PNG, got {path}")
    content = prices.read(file)
    prepare_folder(path.parent)
    return cost_plot.save(content, path)


def _second_order(
    data: DataName, warm_up: int, damping: str, batch_size: int, seed: int, threads: int | None, path: Path
) -> list[Path]:
    from locobench import problems, resemblance
    from locobench.data import load
    from locobench.runfile import prepare_folder
    from locobench.settings import at_least, default_threads, use_device

    threads = default_threads() if threads is None else threads
    at_least(0, warm_up=warm_up, seed=seed)
    at_least(1, batch_size=batch_size, threads=threads)
    try:
        dampings = [float(part) for part in damping.split(",")]
    except ValueError:
        raise BenchError(f"--damping must be comma-separated numbers, got {damping}") from None
    if path.suffix == ".json" or path.is_dir():
        raise BenchError(f"--out must name the PNG, got {path}; the numbers go next to it with the suffix .json")
    prepare_folder(path.parent)
    use_device("cpu", threads)
    images = load(data).train
    model = problems.build("standard", "tanh", images.shape[1], seed)
    with Console().status("measuring") as status:
        content = resemblance.experiment(
            model,
            images,
            {"data": data, "model": "standard", "activation": "tanh"},
            warm_up=warm_up,
            batch_size=batch_size,
            dampings=dampings,
            seed=seed,
            on_part=status.update,
        )
    return resemblance.save(content, path)


@app.command()
def speed(
    model: Model = "standard",
    activation: Act = "tanh",
    width: Annotated[
        str, typer.Option(help="Comma-separated: hidden widths and code times each of them. Example: 1,2,4")
    ] = "1",
    depth: Annotated[
        str, typer.Option(help="Comma-separated: the number of 500 layers times each of them. Example: 1,2,3,4")
    ] = "1",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated. {METHODS_HELP}. Here also: {', '.join(SPEED_ONLY)}. Adam is always timed as well."
        ),
    ] = "all",
    batch_size: Annotated[str, typer.Option(help="Comma-separated: images per step. Example: 256,1000,4096")] = "1000",
    rounds: Annotated[
        int,
        typer.Option(
            help="Timed steps per method, each next to one of Adam; the median is reported. Where a method does more "
            "in every tenth step, a round is the mean of ten."
        ),
    ] = 7,
    device: Device = "cpu",
    threads: Threads = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON for all single times, with machine and versions. The table goes next to it (.md), and where "
            "several sizes are timed, a plot of cost against size (.png).",
        ),
    ] = Path("runs/speed.json"),
) -> None:
    """Measure what a step of each method costs, in time and in memory, next to Adam's.

    A step is zero_grad, forward, backward and step, on random images of 784 pixels. Steps are timed in
    turns with Adam's in one process; the ratio is the number to trust on a busy machine. Every combination of
    --width, --depth and --batch-size is a section of the table.

    GFLOP/s counts the matrix products of a step, where they are known; its peak is what the machine reaches on the
    products of a forward and backward pass alone. Peak MB is the most that torch held at a time, besides model and
    batch.

    Example: locobench speed --methods locoprop-m,locoprop-s --rounds 15

    Example: locobench speed --methods locoprop-m-fast,muon,soap,kfac --width 1,2,4
    """
    with _plain_errors():
        from rich.progress import Progress

        from locobench import cost_plot, prices
        from locobench import speed as job
        from locobench.methods import PRICED, find_all
        from locobench.runfile import prepare_folder, write_atomically
        from locobench.settings import at_least, counted_threads, default_threads, whole_numbers

        at_least(1, rounds=rounds)
        threads = default_threads() if threads is None else threads
        at_least(1, threads=threads)
        widths, depths = whole_numbers("width", width), whole_numbers("depth", depth)
        batch_sizes = whole_numbers("batch-size", batch_size)
        chosen = find_all(methods, PRICED)
        prepare_folder(out.parent)
        if out.is_dir():
            raise BenchError(f"--out {out} is a folder; name a file in it, such as {out / 'speed.json'}")
        if out.suffix.lower() in (".png", ".md"):
            raise BenchError(f"--out must name the JSON, got {out}; table and plot go next to it, as .md and .png")
        settings = {
            "model": model,
            "activation": activation,
            "width": widths,
            "depth": depths,
            "batch_size": batch_sizes,
            "rounds": rounds,
            "device": device,
            "threads": threads,
        }
        console = Console()
        sections: list[prices.Section] = []
        # Redrawn by hand, as a thread that redraws would run on the clock.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            sizes = len(widths) * len(depths) * len(batch_sizes)
            total = sizes * rounds * sum(method.missing is None for method in chosen)
            task = progress.add_task("timing", total=total)
            for section in job.measure(
                chosen,
                model=model,
                activation=activation,
                widths=widths,
                depths=depths,
                batch_sizes=batch_sizes,
                rounds=rounds,
                device=device,
                threads=threads,
                on_round=lambda section, method: progress.update(
                    task, advance=1, refresh=True, description=f"{section.title}: {method.label}"
                ),
            ):
                sections.append(section)
                content = prices.save(sections, settings, out)  # an interruption costs one section at most
        title = f"{model} {activation} autoencoder, {device}, {counted_threads(threads)}"
        console.print(prices.table(sections, title))
        text = prices.markdown(sections, title)
        write_atomically(out.with_suffix(".md"), lambda file: file.write_text(text, encoding="utf-8"))
        written = [out, out.with_suffix(".md")]
        if cost_plot.varying(content):
            written.append(cost_plot.save(content, out.with_suffix(".png")))
        for made in written:
            console.print(f"written: {made}", highlight=False, markup=False, soft_wrap=True)


app.command()(tune)
app.command()(cli_report.report)
app.command()(cli_report.export)


def main() -> None:
    """Entry point of the command."""
    app()


def _show(folder: Path, *, best: bool = False, speed: Path | None = None, absent: Sequence["Method"] = ()) -> None:
    from locobench import table

    console = Console()
    drawn = table.draw(folder, best=best, speed=speed, absent=absent)
    console.print()
    console.print(drawn.table)
    for note in drawn.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    for file in drawn.files:
        # One path a line, never wrapped: to be copied or clicked.
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)
