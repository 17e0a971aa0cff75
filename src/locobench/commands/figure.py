"""`locobench figure`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from locobench.choices import DataName, FigureName
from locobench.commands.options import Threads
from locobench.errors import BenchError
from locobench.plain_errors import plain_errors


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
    with plain_errors():
        if path.is_dir() or path.suffix.lower() != ".png":
            raise BenchError(f"--out must name the PNG, got {path}")
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

    content = prices.read(file)
    prepare_folder(path.parent)
    return cost_plot.save(content, path)


def _second_order(
    data: DataName, warm_up: int, damping: str, batch_size: int, seed: int, threads: int | None, path: Path
) -> list[Path]:
    from locobench import problems, resemblance, resemblance_plot
    from locobench.data import load
    from locobench.runfile import prepare_folder
    from locobench.settings import MOST_SEED, at_least, at_most, default_threads, use_device

    threads = default_threads() if threads is None else threads
    at_least(0, warm_up=warm_up, seed=seed)
    at_least(1, batch_size=batch_size, threads=threads)
    at_most(MOST_SEED, seed=seed)
    try:
        dampings = [float(part) for part in damping.split(",")]
    except ValueError:
        raise BenchError(f"--damping must be comma-separated numbers, got {damping}") from None
    if not resemblance_plot.may_replace(path.with_suffix(".json")):
        raise BenchError(f"the numbers would replace {path.with_suffix('.json')}, another file; choose another --out")
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
    return resemblance_plot.save(content, path)
