"""`locobench speed`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from locobench.choices import SPEED_ONLY
from locobench.commands.options import METHODS_HELP, Act, Device, Model, Threads
from locobench.errors import BenchError
from locobench.plain_errors import plain_errors


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
    with plain_errors():
        from rich.progress import Progress

        from locobench import cost_plot, prices
        from locobench import speed as job
        from locobench.methods import PRICED, find_all
        from locobench.runfile import prepare_folder, write_atomically
        from locobench.settings import at_least, counted_threads, default_threads, use_device, whole_numbers

        at_least(1, rounds=rounds)
        threads = default_threads() if threads is None else threads
        widths, depths = whole_numbers("width", width, 1000), whole_numbers("depth", depth, 1000)
        batch_sizes = whole_numbers("batch-size", batch_size, 10**12)
        chosen = find_all(methods, PRICED)
        if out.is_dir():
            raise BenchError(f"--out {out} is a folder; name a file in it, such as {out / 'speed.json'}")
        if out.suffix.lower() != ".json":
            raise BenchError(f"--out must name the JSON, got {out}; table and plot go next to it, as .md and .png")
        if out.exists():
            prices.read(out)  # an earlier measurement is replaced, another file is not
        else:
            for other in (out.with_suffix(".md"), out.with_suffix(".png")):
                if other.exists():
                    raise BenchError(
                        f"table and plot go next to the JSON, and would replace {other}; choose another --out"
                    )
        use_device(device, threads)
        prepare_folder(out.parent)
        unfinished = out.with_suffix(".unfinished.json")
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
                if not sections or sections[-1] is not section:
                    sections.append(section)
                content = prices.save(sections, settings, unfinished)  # an interruption costs one method at most
        prices.save(sections, settings, out)
        unfinished.unlink()
        title = f"{model} {activation} autoencoder, {device}, {counted_threads(threads)}"
        console.print(prices.table(sections, title))
        text = prices.markdown(sections, title)
        write_atomically(out.with_suffix(".md"), lambda file: file.write_text(text, encoding="utf-8"))
        written = [out, out.with_suffix(".md")]
        if cost_plot.varying(content):
            written.append(cost_plot.save(content, out.with_suffix(".png")))
        for made in written:
            console.print(f"written: {made}", highlight=False, markup=False, soft_wrap=True)
