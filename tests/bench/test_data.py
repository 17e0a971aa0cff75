"""The images: the same everywhere, and never damaged ones."""

import bz2
import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from locobench import data
from locobench.curves import curves
from locobench.download import Download, RemoteFile, read_idx_images, read_libsvm_images
from locobench.errors import BenchError


def test_curves_are_the_same_on_every_machine():
    images = curves(300, seed=1)
    assert images.shape == (300, 28, 28)
    assert images.dtype == np.uint8
    assert np.array_equal(images, curves(300, seed=1))
    assert not np.array_equal(images, curves(300, seed=2))
    # Frozen: a change of a single grey level makes earlier results incomparable and needs a new protocol number.
    sha256 = "e805fa57059905f2ddb059be956b20040c71a8bbd553acc7791269dfc17c5758"
    assert hashlib.sha256(images.tobytes()).hexdigest() == sha256


def test_curves_are_thin_strokes_away_from_the_frame():
    images = curves(300, seed=1) / 255
    assert images.max() == 1
    ink = (images > 0).mean(axis=(1, 2))
    assert 0.02 < ink.min() < ink.max() < 0.25
    grey = (images > 0) & (images < 1)
    assert grey.any(axis=(1, 2)).all(), "strokes are antialiased"
    assert len(np.unique(images.reshape(300, -1), axis=0)) == 300


def test_loads_curves_flat_between_0_and_1():
    images = data.load("curves")
    assert (images.train.shape, images.test.shape) == ((20_000, 784), (10_000, 784))
    assert images.shape == (28, 28)
    assert images.train.dtype == torch.float32
    assert images.train.min() == 0
    assert images.train.max() == 1
    few = images.first(50)
    assert (len(few.train), len(few.test)) == (50, 50)


def test_unknown_name():
    with pytest.raises(BenchError, match="unknown data set 'faces'.*curves, mnist"):
        data.load("faces")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCOBENCH_DATA", str(tmp_path))
    return tmp_path


def test_the_users_folder_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.savez_compressed(folder / "mnist.npz", x_train=pixels, x_test=pixels[:1])
    monkeypatch.setitem(data.NPZ_SHA256, "mnist", hashlib.sha256((folder / "mnist.npz").read_bytes()).hexdigest())
    images = data.load("mnist", downloads={})
    assert images.shape == (3, 3)
    assert torch.equal(images.train, torch.arange(18.0).reshape(2, 9) / 255)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "usps"])
def test_a_damaged_file_in_the_users_folder_is_named(folder: Path, name: str):
    path = folder / data.NPZ_FILES[name]
    path.write_bytes(b"half a downl")
    with pytest.raises(BenchError) as error:
        data.load(name)
    got = hashlib.sha256(b"half a downl").hexdigest()
    for part in (str(path), data.NPZ_SHA256[name], got, "replace it"):
        assert part in str(error.value)


def test_a_users_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LOCOBENCH_DATA", str(tmp_path / "typo"))
    with pytest.raises(BenchError, match="typo.*not a folder"):
        data.load("mnist")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine and the folder that it serves."""
    monkeypatch.delenv("LOCOBENCH_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "mirror"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def _idx(pixels: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(">4I", 0x0803, *pixels.shape) + pixels.tobytes())


def _remote(url: str, content: bytes, *more: str) -> RemoteFile:
    return RemoteFile((url, *more), "md5:" + hashlib.md5(content).hexdigest())


TRAIN = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
TEST = TRAIN[:2] + 100


def _serve(mirror: tuple[str, Path]) -> dict[str, Download]:
    url, folder = mirror
    train, test = _idx(TRAIN), _idx(TEST)
    (folder / "train.gz").write_bytes(train)
    (folder / "test.gz").write_bytes(test)
    remote = (_remote(url + "train.gz", train), _remote(url + "test.gz", test))
    return {"mnist": Download("mnist", *remote, read_idx_images)}


def test_downloads_once_and_again_when_the_copy_is_damaged(mirror: tuple[str, Path], tmp_path: Path):
    downloads, cache = _serve(mirror), tmp_path / "cache"
    images = data.load("mnist", downloads, cache)
    assert images.shape == (4, 3)
    assert torch.equal(images.train, torch.from_numpy(TRAIN.reshape(5, -1)).float() / 255)
    assert torch.equal(images.test, torch.from_numpy(TEST.reshape(2, -1)).float() / 255)

    (cache / "mnist" / "train.gz").write_bytes(b"damaged")
    assert torch.equal(data.load("mnist", downloads, cache).train, images.train)

    for file in mirror[1].iterdir():
        file.unlink()
    assert torch.equal(data.load("mnist", downloads, cache).train, images.train), "the cache needs no mirror"


def test_a_mirror_that_serves_something_else(mirror: tuple[str, Path], tmp_path: Path):
    downloads = _serve(mirror)
    (mirror[1] / "train.gz").write_bytes(b"sorry")
    with pytest.raises(BenchError) as error:
        data.load("mnist", downloads, tmp_path / "cache")
    expected = downloads["mnist"].train.known_hash.split(":")[1]
    for part in ("train.gz", expected, hashlib.md5(b"sorry").hexdigest(), "LOCOBENCH_DATA", "--data curves"):
        assert part in str(error.value)
    assert not (tmp_path / "cache" / "mnist" / "train.gz").exists()


def test_a_damaged_copy_that_cannot_be_replaced(mirror: tuple[str, Path], tmp_path: Path):
    downloads, cache = _serve(mirror), tmp_path / "cache"
    data.load("mnist", downloads, cache)
    (cache / "mnist" / "train.gz").write_bytes(b"damaged")
    (mirror[1] / "train.gz").unlink()
    with pytest.raises(BenchError, match="cached copy is damaged.*" + hashlib.md5(b"damaged").hexdigest()):
        data.load("mnist", downloads, cache)


def test_the_next_mirror_is_tried(mirror: tuple[str, Path], tmp_path: Path):
    good = _serve(mirror)["mnist"]
    train = RemoteFile((mirror[0] + "gone/train.gz", *good.train.urls), good.train.known_hash)
    images = data.load("mnist", {"mnist": Download("mnist", train, good.test, good.read)}, tmp_path / "cache")
    assert len(images.train) == 5


def test_libsvm_pixels_go_from_0_to_1(tmp_path: Path):
    path = tmp_path / "usps.bz2"
    path.write_bytes(bz2.compress(b"7 1:-1 2:-0.5 3:0 4:1\n3 1:1 2:1 3:1 4:-1\n"))
    images = read_libsvm_images(path)
    assert images.dtype == np.float32
    assert images.tolist() == [[[0, 0.25], [0.5, 1]], [[1, 1], [1, 0]]]


def test_what_is_not_idx_is_refused(tmp_path: Path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(struct.pack(">2I", 0x0801, 3) + b"123"))
    with pytest.raises(BenchError, match="labels.gz is not an IDX file of images"):
        read_idx_images(path)
