"""The rows X of a local problem as the linear map that they are: products with X, without X where it is large.

A layer's weight meets X as a matrix, (d_out, d_in). With g groups, as grouped convolutions have them, X is g matrices
of shape (N, d_in), and the units fall into g equal shares, each of which meets one of them. All that is said of
C = XᵀX is then meant group by group.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchloco.grouped import by_group


class Inputs(ABC):
    """X. Yours needs `blocks`, `part` and `to`; the products are the sums over all blocks unless you know better.

    Args:
        n: N, the number of rows.
        d_in: The number of columns.
        groups: g, in how many groups the units are.
        fill: The share of X's entries that products visit, where the others are zero by construction.
    """

    #: Which rows of the groups are rows, (g, N), where others only fill up; None where all are.
    mask: Tensor | None = None
    #: Whether `apply` makes use of its `out`.
    takes_out: bool = False
    #: Whether these are the rows of one of several processes, whose sums are over the rows of all.
    shared: bool = False

    def __init__(self, n: int, d_in: int, groups: int = 1, fill: float = 1.0) -> None:
        self.n, self.d_in, self.groups, self.fill = n, d_in, groups, fill

    @property
    def all_rows(self) -> int:
        """The number of rows in all processes."""
        return self.n

    @property
    def fewest_rows(self) -> int:
        """The number of rows in the process that has fewest."""
        return self.n

    @property
    def group_rows(self) -> list[int]:
        """How many rows each group has, in all processes."""
        return [self.n] * self.groups if self.mask is None else [int(n) for n in self.mask.sum(1).tolist()]

    def total(self, t: Tensor) -> Tensor:
        """A sum over these rows as one over the rows of all processes; `t` may be written to."""
        return t

    def largest(self, t: Tensor) -> Tensor:
        """The largest over these rows as that over the rows of all processes."""
        return t

    def with_ones(self) -> Inputs:
        """The same rows with one more column, of ones."""
        return WithOnes(self)

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time: which they are, and the rows, (g, n, d_in)."""

    @abstractmethod
    def part(self, k: int, parts: int) -> Inputs:
        """The rows k, k + parts, k + 2·parts, … in memory of their own."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Inputs:
        """The same rows in that dtype, without what a product may have left in memory."""

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight, in the shape of the layer's parameter, as a matrix (d_out, d_in); a view where there is one."""
        return weight.flatten(1)

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The opposite of `matrix`; `shape` is the parameter's."""
        return matrix.view(shape)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """X W̃ᵀ + b̃ for a matrix, (N, d_out). It may be put into `out`."""
        products = [by_group(weight, self.groups) @ x.mT for _, x in self.blocks()]  # (g, d_out / g, n)
        a = torch.cat([p.flatten(0, 1) for p in products], 1).t() if products else weight.new_empty(0, len(weight))
        return a.contiguous() if bias is None else a + self.times_ones(bias)

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """δᵀX, Σ over the rows of δ xᵀ, (d_out, d_in), for δ of shape (N, d_out). It may be put into `out`."""
        total = delta.new_zeros(self.groups, delta.shape[1] // self.groups, self.d_in)
        for rows, x in self.blocks():
            total += by_group(delta[rows].t(), self.groups) @ x
        return total.flatten(0, 1)

    def times_ones(self, bias: Tensor) -> Tensor:
        """1 b̃ᵀ, what a bias adds to X W̃ᵀ, as something that broadcasts to (N, d_out)."""
        if self.mask is None:
            return bias
        return (self.mask.t()[..., None] * by_group(bias, self.groups)).flatten(1)

    def sum_ones(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """δᵀ1, the bias's gradient, (d_out,)."""
        if self.mask is None:
            return torch.sum(delta, 0, out=out)
        return (by_group(delta.t(), self.groups) @ self.mask[..., None].to(delta.dtype)).flatten()

    def count_ones(self, bias: Tensor) -> Tensor:
        """1ᵀ1 b̃, every bias times its number of rows."""
        counts = self.group_rows
        if len(set(counts)) == 1:
            return bias * counts[0]
        return (by_group(bias, self.groups) * bias.new_tensor(counts)[:, None]).flatten()

    def along(self, v: Tensor) -> Tensor:
        """X v for a vector of d_in entries, (N, g)."""
        return self.apply(v.expand(self.groups, -1))

    def gram(self) -> Tensor:
        """C = XᵀX, (d_in, d_in), or (g, d_in, d_in) for more than one group."""
        return self._added(x.mT @ x for _, x in self.blocks())

    def row_sum(self) -> Tensor:
        """Σ_rows X, (d_in,) or (g, d_in)."""
        return self._added(x.sum(1) for _, x in self.blocks())

    def squares(self) -> float:
        """The sum of the squares of X's entries, the trace of C."""
        return float(self._added(x.square().sum((1, 2)) for _, x in self.blocks()).sum())

    def dense(self) -> Tensor:
        """X itself, (N, d_in) or (g, N, d_in): for a convolution all patches, which may be much memory."""
        x = torch.cat([x for _, x in self.blocks()], 1)
        return x[0] if self.groups == 1 else x

    def _added(self, terms: Iterator[Tensor]) -> Tensor:
        total = next(terms)
        for term in terms:
            total += term
        return total[0] if self.groups == 1 else total


class Dense(Inputs):
    """Rows that lie in memory as a matrix.

    Args:
        x: X, (N, d_in).
    """

    takes_out = True

    def __init__(self, x: Tensor) -> None:
        super().__init__(*x.shape)
        self.x = x

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows at once."""
        yield slice(None), self.x[None]

    def having(self, x: Tensor) -> Dense:
        """Other rows of the same layer."""
        return type(self)(x)

    def part(self, k: int, parts: int) -> Dense:
        """See `Inputs.part`."""
        return self.having(self.x[k::parts].contiguous())

    def to(self, dtype: torch.dtype) -> Dense:
        """See `Inputs.to`."""
        return self.having(self.x.to(dtype))

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        if bias is None:
            return torch.mm(self.x, weight.t(), out=out)
        return torch.addmm(bias, self.x, weight.t(), out=out)

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        return torch.mm(delta.t(), self.x, out=out)

    def along(self, v: Tensor) -> Tensor:
        """See `Inputs.along`."""
        return (self.x @ v)[:, None]

    def dense(self) -> Tensor:
        """X."""
        return self.x


class DenseTransposed(Dense):
    """Rows that lie in memory and meet a weight of shape (d_in, d_out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        """See `Inputs.matrix`."""
        return weight.t()

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """See `Inputs.shaped`."""
        return matrix.t()


class Grouped(Inputs):
    """Rows of several groups that lie in memory.

    Args:
        x: X, (g, N, d_in).
        counts: How many rows each group has, where that is not N; the others must be zero.
    """

    def __init__(self, x: Tensor, counts: Sequence[int] | None = None) -> None:
        super().__init__(x.shape[1], x.shape[2], x.shape[0])
        self.x = x
        self._counts = [self.n] * self.groups if counts is None else list(counts)
        if min(self._counts) < self.n:
            rows = torch.arange(self.n, device=x.device)
            self.mask = torch.stack([rows < count for count in self._counts]).to(x.dtype)

    @property
    def group_rows(self) -> list[int]:
        """See `Inputs.group_rows`."""
        return self._counts

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows at once."""
        yield slice(None), self.x

    def part(self, k: int, parts: int) -> Grouped:
        """See `Inputs.part`."""
        return Grouped(self.x[:, k::parts].contiguous(), [len(range(k, count, parts)) for count in self._counts])

    def to(self, dtype: torch.dtype) -> Grouped:
        """See `Inputs.to`."""
        return Grouped(self.x.to(dtype), self._counts)


class Stacked(Inputs):
    """The rows of several calls, one below the other.

    Args:
        pieces: The calls' rows, of the same columns and groups.
    """

    def __init__(self, pieces: Sequence[Inputs]) -> None:
        n = sum(piece.n for piece in pieces)
        fill = sum(piece.n * piece.fill for piece in pieces) / max(1, n)
        super().__init__(n, pieces[0].d_in, pieces[0].groups, fill)
        self._pieces = list(pieces)
        ends = list(itertools.accumulate(piece.n for piece in pieces))
        self._rows = [slice(end - piece.n, end) for piece, end in zip(pieces, ends, strict=True)]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Those of the pieces."""
        for rows, piece in zip(self._rows, self._pieces, strict=True):
            for within, x in piece.blocks():
                start, stop, _ = within.indices(piece.n)
                yield slice(rows.start + start, rows.start + stop), x

    def part(self, k: int, parts: int) -> Inputs:
        """See `Inputs.part`."""
        offsets = [(k - rows.start) % parts for rows in self._rows]
        chosen = [
            piece.part(offset, parts) for piece, offset in zip(self._pieces, offsets, strict=True) if offset < piece.n
        ]
        return stacked(chosen)

    def to(self, dtype: torch.dtype) -> Stacked:
        """See `Inputs.to`."""
        return Stacked([piece.to(dtype) for piece in self._pieces])

    def matrix(self, weight: Tensor) -> Tensor:
        """See `Inputs.matrix`."""
        return self._pieces[0].matrix(weight)

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """See `Inputs.shaped`."""
        return self._pieces[0].shaped(matrix, shape)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        return torch.cat([piece.apply(weight, bias) for piece in self._pieces])

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        sums = [piece.sum(delta[rows]) for rows, piece in zip(self._rows, self._pieces, strict=True)]
        return torch.stack(sums).sum(0)


class WithOnes(Inputs):
    """Rows with one more column, of ones, for a bias that is one more column of the weight.

    Args:
        inputs: The rows without it.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs.n, inputs.d_in + 1, inputs.groups, inputs.fill)
        self._inputs = inputs
        self.mask = inputs.mask

    @property
    def group_rows(self) -> list[int]:
        """Those of the rows."""
        return self._inputs.group_rows

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Those of the rows, with the column."""
        for rows, x in self._inputs.blocks():
            ones = x.new_ones(*x.shape[:-1], 1) if self.mask is None else self.mask[:, rows, None]
            yield rows, torch.cat([x, ones], -1)

    def part(self, k: int, parts: int) -> WithOnes:
        """See `Inputs.part`."""
        return WithOnes(self._inputs.part(k, parts))

    def to(self, dtype: torch.dtype) -> WithOnes:
        """See `Inputs.to`."""
        return WithOnes(self._inputs.to(dtype))

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        ones = weight[:, -1] if bias is None else weight[:, -1] + bias
        return self._inputs.apply(weight[:, :-1], ones, out=out)

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        return torch.cat([self._inputs.sum(delta), self.sum_ones(delta)[:, None]], 1)

    def gram(self) -> Tensor:
        """See `Inputs.gram`."""
        gram, row_sum = self._inputs.gram(), self._inputs.row_sum()[..., None]
        ones = self.count_ones(gram.new_ones(self.groups))
        corner = ones.view_as(row_sum[..., :1, :])
        return torch.cat([torch.cat([gram, row_sum], -1), torch.cat([row_sum.mT, corner], -1)], -2)


def stacked(pieces: Sequence[Inputs]) -> Inputs:
    """The rows of several calls as one: a matrix where all are."""
    dense = [piece for piece in pieces if isinstance(piece, Dense)]
    if len(pieces) == 1:
        return pieces[0]
    return dense[0].having(torch.cat([piece.x for piece in dense])) if len(dense) == len(pieces) else Stacked(pieces)
