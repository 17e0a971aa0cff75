"""Conjugate gradients for many systems at once: one per unit, which all share the rows X."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    image: Callable[[Tensor], Tensor], right: Tensor, iterations: int, tolerance: float, *, per_unit: bool = True
) -> Tensor:
    """The Δ with image(Δ) = right, from Δ = 0, for a positive semi-definite linear map.

    Args:
        image: The map on matrices of the shape of `right`.
        right: (d_out, columns).
        iterations: At most so many.
        tolerance: A unit stops when its residual has fallen by this factor.
        per_unit: Whether the map keeps the units (rows of `right`) apart, so that each can have its own step sizes.
    """
    dims = (1,) if per_unit else (0, 1)
    rest, change, direction = right.clone(), torch.zeros_like(right), right.clone()
    energy = rest.square().sum(dims, keepdim=True)
    enough = energy * tolerance**2
    for _ in range(iterations):
        image_of_direction = image(direction)
        curvature = (direction * image_of_direction).sum(dims, keepdim=True)
        active = (energy > enough) & (curvature > 0)
        if not active.any():
            break
        size = torch.where(active, energy / curvature, 0.0)
        change.addcmul_(size, direction)
        rest.addcmul_(size, image_of_direction, value=-1)
        fresh = torch.where(active, rest.square().sum(dims, keepdim=True), energy)
        direction.mul_(torch.where(active, fresh / energy, 0.0)).add_(rest)
        energy = fresh
    return change
