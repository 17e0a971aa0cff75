"""The images of the benchmark: drawn, read from a folder of the user's, or downloaded once.

CURVES is drawn. The others are looked for in `$LOCOBENCH_DATA`, in the cache of earlier downloads and at the
mirrors, in this order, and whatever is found has to match a known checksum.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from locobench import curves
from locobench.choices import DATA_NAMES
from locobench.download import DOWNLOADS, Download, cache_folder, checksum, fetch
from locobench.errors import BenchError

# The files looked for in $LOCOBENCH_DATA, and their sha256.
NPZ_FILES = {"mnist": "mnist.npz", "fashion-mnist": "fashion_mnist.npz", "usps": "usps.npz"}
NPZ_SHA256 = {
    "mnist": "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
    "fashion-mnist": "5b6d2c4c694a91887af8ab7d039c04f80af3c29378d731c93a538d2e831aa469",
    "usps": "95e790f272f9ff97b293f6960cbae5a4632b24788dc64725d33a6fed681fab9f",
}


@dataclass(frozen=True)
class Images:
    """Flattened float32 images with values in 0..1, shape (N, d), and the (height, width) that gives d."""

    train: Tensor
    test: Tensor
    shape: tuple[int, int]

    def first(self, count: int) -> "Images":
        """The first `count` training images and at most as many test images."""
        return Images(self.train[:count], self.test[:count], self.shape)


def load(name: str, downloads: dict[str, Download] = DOWNLOADS, cache: Path | None = None) -> Images:
    """Load a data set by name.

    Args:
        name: One of `curves`, `mnist`, `fashion-mnist`, `usps`.
        downloads: Where to download from, and the checksums that must come out.
        cache: Folder for downloads; by default the one that the operating system reserves for caches.
    """
    if name not in DATA_NAMES:
        raise BenchError(f"unknown data set {name!r}; there are: {', '.join(DATA_NAMES)}")
    if name == "curves":
        return _images(
            curves.curves(curves.TRAIN_IMAGES, curves.TRAIN_SEED),
            curves.curves(curves.TEST_IMAGES, curves.TEST_SEED),
        )
    path = users_file(name)
    if path is not None:
        return _read_npz(path, NPZ_SHA256[name])
    return _images(*fetch(downloads[name], cache or cache_folder()))


def users_file(name: str) -> Path | None:
    """The data set's file in `$LOCOBENCH_DATA`, None where there is none."""
    folder = os.environ.get("LOCOBENCH_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise BenchError(f"LOCOBENCH_DATA is {folder!r}, which is not a folder; correct or unset it")
    path = Path(folder) / NPZ_FILES[name]
    return path if path.exists() else None


def _read_npz(path: Path, sha256: str) -> Images:
    try:
        got = checksum(path, "sha256")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from error
    if got != sha256:
        raise BenchError(
            f"{path} is damaged or is another file: expected sha256 {sha256}, got {got}; "
            "replace it, or unset LOCOBENCH_DATA to download the data"
        )
    with np.load(path) as arrays:
        return _images(arrays["x_train"], arrays["x_test"])


def _images(train: NDArray[np.generic], test: NDArray[np.generic]) -> Images:
    height, width = train.shape[1:]
    return Images(_flatten(train), _flatten(test), (height, width))


def _flatten(images: NDArray[np.generic]) -> Tensor:
    pixels = torch.from_numpy(images.reshape(len(images), -1))
    if pixels.dtype == torch.uint8:  # grey levels 0..255; floats are in 0..1 already
        return pixels.float() / 255
    return pixels.float()
