"""Libraries that only some methods need: nothing else waits for them, and nothing fails without them."""

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Library:
    """A library that the benchmark can do without.

    Attributes:
        module: What is imported.
        install: The command that installs it, with what it needs.
    """

    module: str
    install: str

    @property
    def missing(self) -> bool:
        """Whether it, or a module that it needs, is not installed, or broken."""
        try:
            self.load()
        except Exception:  # whatever a library does when it does not fit the torch that is there
            return True
        return False

    def load(self) -> Any:
        """The module. What it warns of when imported is for its authors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(self.module)


PYTORCH_OPTIMIZER = Library("pytorch_optimizer", "pip install pytorch_optimizer")
# Its own requirements would bring torchvision, which nothing here uses.
CURVLINOPS = Library(
    "curvlinops",
    "pip install --no-deps curvlinops-for-pytorch einconv einops linear_operator opt_einsum scipy tqdm",
)
SCHEDULEFREE = Library("schedulefree", "pip install schedulefree")
LOCOPROP = Library("locoprop", "pip install locoprop==0.1.0")
# Of the report and of `export`.
PLOTLY = Library("plotly", "pip install plotly")
JINJA = Library("jinja2", "pip install jinja2")
TENSORBOARD = Library("tensorboard", "pip install tensorboard")
