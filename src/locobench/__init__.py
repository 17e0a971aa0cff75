"""locobench: LocoProp next to the usual optimizers, on the deep autoencoder."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("torchloco")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
