"""Libraries that only some methods need: nothing else waits for them, and nothing fails without them."""

from dataclasses import dataclass
from importlib import import_module


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
        """Whether it, or a module that it needs, is not installed."""
        try:
            import_module(self.module)
        except ModuleNotFoundError:
            return True
        return False


PYTORCH_OPTIMIZER = Library("pytorch_optimizer", "pip install pytorch_optimizer")
# Its own requirements would bring torchvision, which nothing here uses.
CURVLINOPS = Library(
    "curvlinops",
    "pip install --no-deps curvlinops-for-pytorch einconv einops linear_operator opt_einsum scipy tqdm",
)
LOCOPROP = Library("locoprop", "pip install locoprop==0.1.0")
