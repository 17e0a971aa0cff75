"""Options that several commands take."""

from typing import Annotated

import typer

from locobench.choices import MAIN_METHODS, MORE_METHODS, Activation, ModelName

METHODS_HELP = (
    f"{', '.join(MAIN_METHODS)} (together: main); others: {', '.join(MORE_METHODS)}; all for both, study for those "
    "that tune searches unless told otherwise"
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
