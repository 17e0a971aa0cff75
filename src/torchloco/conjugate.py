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
        tolerance: A unit stops when its residual has fallen by this factor, or to rounding.
        per_unit: Whether the map keeps the units (rows of `right`) apart, so that each can have its own step sizes.
    """
    dims = (1,) if per_unit else (0, 1)
    rest, change, direction = right.clone(), torch.zeros_like(right), right.clone()
    energy = rest.square().sum(dims, keepdim=True)
    eps = torch.finfo(right.dtype).eps
    enough = energy * max(tolerance, eps) ** 2
    largest, active = torch.zeros_like(energy), torch.ones_like(energy, dtype=torch.bool)
    for _ in range(iterations):
        image_of_direction = image(direction)
        curvature = (direction * image_of_direction).sum(dims, keepdim=True)
        length = direction.square().sum(dims, keepdim=True)
        largest = torch.maximum(largest, torch.where(length > 0, curvature / length, 0.0))
        # Once all that has curvature is used up, what is left of it is rounding, and would be divided by.
        active = active & (energy > enough) & (curvature > 32 * eps * largest * length)
        if not active.any():
            break
        size = torch.where(active, energy / curvature, 0.0)
        change.addcmul_(size, direction)
        rest.addcmul_(size, image_of_direction, value=-1)
        fresh = torch.where(active, rest.square().sum(dims, keepdim=True), energy)
        direction.mul_(torch.where(active, fresh / energy, 0.0)).add_(rest)
        energy = fresh
    return change
