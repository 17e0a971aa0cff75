"""Products of matrices whose units fall into groups, each with a matrix of its own: those of C = XᵀX and Σ_rows X."""

from __future__ import annotations

import torch
from torch import Tensor


def by_group(matrix: Tensor, groups: int) -> Tensor:
    """(d_out, …) → (g, d_out / g, …)."""
    return matrix.reshape(groups, len(matrix) // groups, *matrix.shape[1:])


def times_gram(
    matrix: Tensor, gram: Tensor, *, plus: Tensor, beta: float = 1.0, alpha: float = 1.0, out: Tensor
) -> Tensor:
    """beta·plus + alpha·matrix C into `out`, (d_out, d_in), where every unit meets its group's C."""
    if gram.dim() == 2:
        return torch.addmm(plus, matrix, gram, beta=beta, alpha=alpha, out=out)
    product = (by_group(matrix, len(gram)) @ gram).flatten(0, 1)
    return torch.add(plus * beta, product, alpha=alpha, out=out)


def along(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix v, (d_out,), for v of shape (d_in,) or, one for each group, (g, d_in)."""
    if vector.dim() == 1:
        return matrix @ vector
    return (by_group(matrix, len(vector)) @ vector[..., None]).flatten()


def times_vector(matrix: Tensor, vector: Tensor, *, plus: Tensor, beta: float, out: Tensor) -> Tensor:
    """beta·plus + matrix v into `out`, (d_out,), for v as in `along`."""
    if vector.dim() == 1:
        return torch.addmv(plus, matrix, vector, beta=beta, out=out)
    return torch.add(along(matrix, vector), plus, alpha=beta, out=out)


def add_outer_(matrix: Tensor, units: Tensor, vector: Tensor) -> Tensor:
    """M + u vᵀ in place, for v as in `along`."""
    if vector.dim() == 1:
        return matrix.addr_(units, vector)
    by_group(matrix, len(vector)).addcmul_(by_group(units, len(vector))[..., None], vector[:, None])
    return matrix


def minus_outer(matrix: Tensor, units: Tensor, vector: Tensor) -> Tensor:
    """M - u vᵀ, for v as in `along`."""
    if vector.dim() == 1:
        return torch.addr(matrix, units, vector, alpha=-1)
    return add_outer_(matrix.clone(), -units, vector)
