"""A few test images and what the trained autoencoder makes of them: a small PNG beside the run file."""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as Picture
from torch import Tensor, nn

from locobench.errors import BenchError
from locobench.runfile import write_atomically

COUNT = 10


def path_of(run_file: Path) -> Path:
    """Where the images of a run are kept."""
    return run_file.with_suffix(".reconstructions.png")


@torch.no_grad()
def save(model: nn.Module, test: Tensor, shape: tuple[int, int], path: Path) -> None:
    """Write the first test images in a row and their reconstructions in a row below, as grey levels.

    Args:
        model: Gives logits for flattened images.
        test: Images, (count, pixels), on the model's device.
        shape: Height and width of an image.
        path: The PNG.
    """
    originals = test[:COUNT]
    rows = [_row(pixels, shape) for pixels in (originals, torch.sigmoid(model(originals)))]
    image = Image.fromarray(torch.cat(rows).numpy())
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))


def read(path: Path) -> tuple[bytes, bytes] | None:
    """Originals and reconstructions as two PNGs, None where a run has none, as those of earlier versions.

    Raises:
        BenchError: The file is damaged.
    """
    image = grey(path)
    if image is None:
        return None
    half = image.height // 2
    return _png(image.crop((0, 0, image.width, half))), _png(image.crop((0, half, image.width, 2 * half)))


def grey(path: Path) -> Picture | None:
    """Originals above reconstructions as one picture of grey levels; None and errors as for `read`."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            found = image.convert("L")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BenchError(f"{path} is damaged ({error}); delete it to go on without these images") from error
    if found.height < 2:
        raise BenchError(f"{path} is no row of images above another; delete it to go on without these images")
    return found


def _png(image: Picture) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _row(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Images side by side, (height, count · width), as bytes."""
    height, width = shape
    images = pixels.reshape(len(pixels), height, width).transpose(0, 1).reshape(height, len(pixels) * width)
    return (255 * images).round().clamp(0, 255).to(torch.uint8).cpu()
