"""Verified downloads of the real image data, from the well-known mirrors, in the formats found there."""

import bz2
import gzip
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
from numpy.typing import NDArray
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from locobench.errors import BenchError

Array = NDArray[np.generic]


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it can be had, tried in order, and the checksum (`algorithm:hex`) that it must have."""

    urls: tuple[str, ...]
    known_hash: str


@dataclass(frozen=True)
class Download:
    """A data set's two image files, and how to read one of them."""

    name: str
    train: RemoteFile
    test: RemoteFile
    read: Callable[[Path], Array]


def fetch(download: Download, cache: Path) -> tuple[Array, Array]:
    """Train and test images, downloaded into `cache/<name>` unless an undamaged copy is there."""
    folder = cache / download.name
    train, test = (download.read(_retrieve(file, folder)) for file in (download.train, download.test))
    return train, test


def cache_folder() -> Path:
    """Where downloads are kept between runs."""
    return Path(pooch.os_cache("locobench"))


def checksum(path: Path, algorithm: str) -> str:
    """The file's checksum in hexadecimal."""
    return str(pooch.file_hash(str(path), alg=algorithm))


def _retrieve(file: RemoteFile, folder: Path) -> Path:
    # pooch checks a cached file, fetches a damaged one again, and moves a download into place only if its
    # checksum is right. What it would log about that is said by the bar and the errors here.
    pooch.get_logger().setLevel(logging.ERROR)
    target = folder / file.urls[0].rsplit("/", 1)[-1]
    algorithm, expected = file.known_hash.split(":")
    failures = []
    for url in file.urls:
        try:
            with _Bar(target.name) as bar:
                downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=30)
                pooch.retrieve(url, file.known_hash, fname=target.name, path=folder, downloader=downloader)
            return target
        except (OSError, ValueError) as error:
            # requests' errors are OSErrors, pooch's wrong checksum is a ValueError
            failures.append(f"{url}: {_one_line(error)}")
    damaged = ""
    if target.exists():
        damaged = f" (the cached copy is damaged: {algorithm} {checksum(target, algorithm)})"
    raise BenchError(
        f"cannot download {target.name} into {folder}{damaged}, expected {algorithm} {expected}; "
        f"tried {'; '.join(failures)}. Put the file there by hand, name a folder with the .npz file in "
        "LOCOBENCH_DATA, or use --data curves, which needs no download"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Bar:
    """A rich progress bar behind the four names that pooch asks of one; it appears when bytes arrive."""

    def __init__(self, label: str) -> None:
        self.total = 0
        self._progress = Progress(
            TextColumn("downloading {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(label)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, count: int) -> None:
        self._progress.start()
        self._progress.update(self._task, total=self.total, advance=count)

    def reset(self) -> None:
        """Pooch ends by filling the bar up; this one counts what came."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()


def read_idx_images(path: Path) -> Array:
    """Images of a gzipped IDX file, the format of MNIST: uint8, shape (N, height, width)."""
    raw = gzip.decompress(path.read_bytes())
    magic, count, height, width = struct.unpack(">4I", raw[:16]) if len(raw) >= 16 else (0, 0, 0, 0)
    if magic != 0x0803 or len(raw) != 16 + count * height * width:
        raise BenchError(f"{path} is not an IDX file of images")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width).copy()


def read_libsvm_images(path: Path) -> Array:
    """Square images of a bzip2-ed libsvm text file, `label 1:v 2:v ...`, from -1..1 to float32 in 0..1."""
    rows = []
    for line in bz2.decompress(path.read_bytes()).decode("ascii").splitlines():
        rows.append([float(field.split(":")[1]) for field in line.split()[1:]])
    pixels = (np.asarray(rows) + 1) / 2
    side = round(pixels.shape[1] ** 0.5)
    return pixels.reshape(-1, side, side).astype(np.float32)


_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
_USPS = ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",)


def _remote(mirrors: tuple[str, ...], file: str, md5: str) -> RemoteFile:
    return RemoteFile(tuple(mirror + file for mirror in mirrors), f"md5:{md5}")


DOWNLOADS = {
    "mnist": Download(
        "mnist",
        _remote(_MNIST, "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _remote(_MNIST, "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        read_idx_images,
    ),
    "fashion-mnist": Download(
        "fashion-mnist",
        _remote(_FASHION, "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        _remote(_FASHION, "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        read_idx_images,
    ),
    "usps": Download(
        "usps",
        _remote(_USPS, "usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197"),
        _remote(_USPS, "usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118"),
        read_libsvm_images,
    ),
}
