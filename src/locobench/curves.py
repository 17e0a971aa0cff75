"""The CURVES data: 28 x 28 images of smooth curves through three random points.

It stands in for the classic data set of that name (Hinton and Salakhutdinov, 2006), whose file is not
distributed any more: an image has six degrees of freedom, related to its pixels in a very non-linear way.
"""

import numpy as np
from numpy.typing import NDArray

SIDE = 28
TRAIN_IMAGES, TRAIN_SEED = 20_000, 20_060_728
TEST_IMAGES, TEST_SEED = 10_000, 20_060_729

_MARGIN = 2.0  # px between the frame and the nearest of the three points
_SHORTEST = 7.0  # px between neighbouring points: shorter strokes would be blobs
_SHARPEST = -0.25  # cosine of the turn at the middle point: sharper ones would be hairpins, not curves
_FULL = 0.4  # px from the middle of the stroke within which it is white
_REACH = 1.4  # px from the middle of the stroke at which it has faded to black
_SAMPLES = 80  # points along a curve: about half a pixel apart


def curves(count: int, seed: int) -> NDArray[np.uint8]:
    """Draw `count` images, shape (count, 28, 28), 0..255; the same ones for the same seed on every machine.

    Only correctly rounded operations (+ - * / sqrt) are used, and grey levels are rounded to bytes.
    """
    return _draw(_sample(_three_points(count, np.random.default_rng(seed))))


def _three_points(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Triples of points, shape (count, 3, 2), whose curve stays inside the frame."""
    kept: list[NDArray[np.float64]] = []
    missing = count
    while missing > 0:
        points = _MARGIN + (SIDE - 1 - 2 * _MARGIN) * rng.random((4 * count, 3, 2))
        steps = np.diff(points, axis=1)
        lengths = np.sqrt((steps**2).sum(-1))
        long_enough = (lengths >= _SHORTEST).all(axis=1)
        smooth = (steps[:, 0] * steps[:, 1]).sum(-1) >= _SHARPEST * lengths[:, 0] * lengths[:, 1]
        points = points[long_enough & smooth]
        path = _sample(points)
        inside = ((path >= 1.0) & (path <= SIDE - 2.0)).all(axis=(1, 2))
        kept.append(points[inside][:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept)


def _sample(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The parabola through each triple, at equally spaced times; shape (count, _SAMPLES, 2).

    The middle point is passed at a time that goes with the distances to its neighbours, so that an uneven
    triple does not make the curve overshoot.
    """
    first, middle, last = points[:, None, 0], points[:, None, 1], points[:, None, 2]
    before = np.sqrt(((middle - first) ** 2).sum(-1, keepdims=True))
    after = np.sqrt(((last - middle) ** 2).sum(-1, keepdims=True))
    at = before / (before + after)
    t = np.linspace(0.0, 1.0, _SAMPLES)[None, :, None]
    # Lagrange's interpolation at the times 0, `at` and 1.
    path: NDArray[np.float64] = (
        first * ((t - at) * (t - 1) / at) + middle * (t * (t - 1) / (at * (at - 1))) + last * (t * (t - at) / (1 - at))
    )
    return path


def _draw(path: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Antialiased strokes: a pixel is as bright as its distance to the nearest sample allows."""
    count, samples, _ = path.shape
    nearest = np.full(count * SIDE * SIDE, 99.0, dtype=np.float32)  # squared distances
    base = np.arange(count) * (SIDE * SIDE)
    for k in range(samples):
        pixel = np.floor(path[:, k] + 0.5)
        rest = (pixel - path[:, k]).astype(np.float32)
        flat = base + (pixel[:, 1] * SIDE + pixel[:, 0]).astype(np.int64)
        # A stroke reaches less than 1.5 px, thus only the eight neighbours of the pixel that its middle is
        # in; these exist, as the curve keeps a pixel away from the frame.
        for x in (-1, 0, 1):
            for y in (-1, 0, 1):
                # One pixel per image: no index repeats, so plain fancy indexing is safe.
                where = flat + (y * SIDE + x)
                squared = (rest[:, 0] + np.float32(x)) ** 2 + (rest[:, 1] + np.float32(y)) ** 2
                nearest[where] = np.minimum(nearest[where], squared)
    distance = np.sqrt(nearest.reshape(count, SIDE, SIDE))
    level = np.clip((np.float32(_REACH) - distance) / np.float32(_REACH - _FULL), 0.0, 1.0)
    grey: NDArray[np.uint8] = np.floor(level * 255 + 0.5).astype(np.uint8)
    return grey
