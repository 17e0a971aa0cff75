"""Data parallelism: rows that are spread over processes, with all that is summed over rows summed over all of them.

Under `DistributedDataParallel` each process (rank) sees its own rows and the mean gradient of all. If every sum over
rows in a local problem is one over the rows of all ranks, each solves the problem of the whole batch and arrives at the
same weights. A local step then costs one reduction of the size of the weight, as back-propagation does.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchloco.inputs import Inputs
from torchloco.targets import LayerRows


class Peers(ABC):
    """The processes that share a batch."""

    #: Whether there is more than one.
    several: bool = False

    @abstractmethod
    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which flags are set in any process."""

    @abstractmethod
    def agreeing(self, device: torch.device) -> AbstractContextManager[list[str]]:
        """Let all processes go on or none: where one raises inside, the others raise too, and do not wait forever.

        Yields:
            A list for what is to be done, an entry by layer, which must be the same in all processes.

        Raises:
            RuntimeError: Another process raised, or has other entries.
        """

    @abstractmethod
    def share(self, all_rows: Sequence[LayerRows]) -> None:
        """Make each layer's rows those of all processes' batch; called in all with the same layers."""


@dataclass(frozen=True)
class Alone(Peers):
    """The only process, which has the whole batch."""

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """See `Peers.any`."""
        return flags

    @contextmanager
    def agreeing(self, device: torch.device) -> Iterator[list[str]]:
        """See `Peers.agreeing`."""
        yield []  # nobody waits

    def share(self, all_rows: Sequence[LayerRows]) -> None:
        """See `Peers.share`."""


@dataclass(frozen=True)
class Ranks(Peers):
    """Several.

    Args:
        group: Their process group.
    """

    several = True
    group: Any

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def sum(self, t: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in `t` where it can be."""
        # Sums of low-precision numbers are taken in float32, as a product over the rows of one rank is.
        total = t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
        total = total.contiguous()
        dist.all_reduce(total, group=self.group)
        return t if total is t else t.copy_(total)

    def max(self, t: Tensor) -> Tensor:
        """The largest of all ranks' tensors, entry by entry."""
        largest = t.contiguous().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """See `Peers.any`."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, dtype=torch.int64, device=device)).tolist()]

    @contextmanager
    def agreeing(self, device: torch.device) -> Iterator[list[str]]:
        """See `Peers.agreeing`."""
        entries: list[str] = []
        try:
            yield entries
        except BaseException:
            self.max(torch.tensor([1, 0, 0], device=device))
            raise
        own = zlib.crc32("\n".join(entries).encode())
        failed, largest, smallest = self.max(torch.tensor([0, own, -own], device=device)).tolist()
        if failed:
            raise RuntimeError("another rank refused this step, and says why; nothing was updated on any")
        if largest != -smallest:
            raise RuntimeError(self._disagreement(entries))

    def _disagreement(self, entries: list[str]) -> str:
        """What to say of entries that differ; called on all ranks."""
        of_ranks: list[list[str]] = [[]] * self.size
        dist.all_gather_object(of_ranks, entries, group=self.group)
        common = set.intersection(*map(set, of_ranks))
        own = [[entry for entry in of_rank if entry not in common][:1] for of_rank in of_ranks]
        seen = "; ".join(f"rank {rank}: {''.join(entry) or 'nothing of this'}" for rank, entry in enumerate(own))
        return (
            f"the ranks would not solve the same problems ({seen}); nothing was updated. Every layer must take part in "
            "the forward pass on all ranks or on none, followed by the same transfer function, and all ranks need the "
            "same options: reduce a metric over the ranks before a scheduler sees it"
        )

    def share(self, all_rows: Sequence[LayerRows]) -> None:
        """See `Peers.share`."""
        if not all_rows:
            return
        device = all_rows[0].g.device
        for rows, totals in zip(all_rows, self.totals([rows.inputs for rows in all_rows], device), strict=True):
            rows.inputs = SharedInputs(rows.inputs, self, device, totals)
            rows.g = rows.g / self.size  # the gradient is the mean of the ranks' own

    def totals(self, inputs: Sequence[Inputs], device: torch.device) -> list[Totals]:
        """What the ranks have of each layer's rows."""
        own = [[x.n, x.n * x.fill, *x.group_rows] for x in inputs]
        flat = torch.tensor([value for values in own for value in values], dtype=torch.float64, device=device)
        sums, fewest = (
            self.sum(flat).tolist(),
            (-self.max(torch.tensor([-x.n for x in inputs], device=device))).tolist(),
        )
        totals = []
        for values, least in zip(own, fewest, strict=True):
            (n, filled, *groups), sums = sums[: len(values)], sums[len(values) :]
            totals.append(Totals(int(n), least, filled / max(1.0, n), [int(rows) for rows in groups]))
        return totals


@dataclass(frozen=True)
class Totals:
    """What all ranks together have of a layer's rows.

    Args:
        rows: How many.
        fewest: How many the rank has that has fewest.
        fill: The share of entries that products visit.
        groups: How many rows each group of units has.
    """

    rows: int
    fewest: int
    fill: float
    groups: list[int]


class SharedInputs(Inputs):
    """The rows of one rank, whose sums are over the rows of all.

    Nothing that decides which sums are taken may be the rank's own, or the ranks would wait for different ones.

    Args:
        inputs: The rank's own rows.
        ranks: Who shares the batch.
        device: Where they are.
        totals: What all ranks have; asked for when it is needed where not given.
    """

    shared = True

    def __init__(self, inputs: Inputs, ranks: Ranks, device: torch.device, totals: Totals | None = None) -> None:
        super().__init__(inputs.n, inputs.d_in, inputs.groups, inputs.fill if totals is None else totals.fill)
        self._own, self._ranks, self._device, self._given = inputs, ranks, device, totals
        self.mask, self.takes_out = inputs.mask, inputs.takes_out

    @cached_property
    def _totals(self) -> Totals:
        return self._given or self._ranks.totals([self._own], self._device)[0]

    @property
    def all_rows(self) -> int:
        """See `Inputs.all_rows`."""
        return self._totals.rows

    @property
    def fewest_rows(self) -> int:
        """See `Inputs.fewest_rows`."""
        return self._totals.fewest

    @property
    def group_rows(self) -> list[int]:
        """See `Inputs.group_rows`."""
        return self._totals.groups

    def total(self, t: Tensor) -> Tensor:
        """See `Inputs.total`."""
        return self._ranks.sum(t)

    def largest(self, t: Tensor) -> Tensor:
        """See `Inputs.largest`."""
        return self._ranks.max(t)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rank's own."""
        return self._own.blocks()

    def part(self, k: int, parts: int) -> SharedInputs:
        """See `Inputs.part`; the rows k, k + parts, … of each rank."""
        return SharedInputs(self._own.part(k, parts), self._ranks, self._device)

    def to(self, dtype: torch.dtype) -> SharedInputs:
        """See `Inputs.to`."""
        return SharedInputs(self._own.to(dtype), self._ranks, self._device, self._given)

    def with_ones(self) -> SharedInputs:
        """See `Inputs.with_ones`."""
        return SharedInputs(self._own.with_ones(), self._ranks, self._device, self._given)

    def matrix(self, weight: Tensor) -> Tensor:
        """See `Inputs.matrix`."""
        return self._own.matrix(weight)

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """See `Inputs.shaped`."""
        return self._own.shaped(matrix, shape)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`; of the rank's own rows."""
        return self._own.apply(weight, bias, out=out)

    def along(self, v: Tensor) -> Tensor:
        """See `Inputs.along`; of the rank's own rows."""
        return self._own.along(v)

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        return self.total(self._own.sum(delta, out=out))

    def sum_ones(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum_ones`."""
        return self.total(self._own.sum_ones(delta, out=out))

    def gram(self) -> Tensor:
        """See `Inputs.gram`."""
        return self.total(self._own.gram())

    def row_sum(self) -> Tensor:
        """See `Inputs.row_sum`."""
        return self.total(self._own.row_sum())

    def squares(self) -> float:
        """See `Inputs.squares`."""
        return float(self.total(torch.tensor(self._own.squares(), dtype=torch.float64, device=self._device)))

    def dense(self) -> Tensor:
        """The rank's own rows."""
        return self._own.dense()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`, or the model itself.

    Raises:
        ValueError: Its weights or its calls are spread over devices in another way.
    """
    kinds = {type(module).__name__ for module in model.modules()} & {"DataParallel", "FullyShardedDataParallel"}
    kinds |= {type(p).__name__ for p in model.parameters() if hasattr(p, "placements")}  # DTensors
    if kinds:
        raise ValueError(
            f"{', '.join(sorted(kinds))} is not supported: a layer's whole weight must be in each process. Use "
            "DistributedDataParallel, or one device"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def peers_now() -> Peers:
    """Who shares the batch of the forward pass under way: the ranks of the `DistributedDataParallel` that runs it.

    Raises:
        RuntimeError: Some of them may have no batch, inside `join()`.
    """
    # Trainers wrap the model after they built the optimizer; this is how torch itself finds the wrapper.
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None or dist.get_world_size(wrapper.process_group) == 1:
        return Alone()
    if wrapper._join_config.enable:
        raise RuntimeError(
            "DistributedDataParallel.join() is not supported: LocoProp's steps communicate too, and would wait forever "
            "for ranks without a batch. Give all ranks as many batches, by DistributedSampler for one"
        )
    return Ranks(wrapper.process_group)


def one_of(peers: Iterable[Peers]) -> Peers:
    """Who shares the batch, of the peers of every captured call: calls beside the wrapper are part of its batch too.

    Raises:
        RuntimeError: There are several groups.
    """
    groups = {found for found in peers if isinstance(found, Ranks)}
    if len(groups) > 1:
        raise RuntimeError(
            "parts of the model run in DistributedDataParallel wrappers of different process groups; wrap the whole "
            "model in one"
        )
    return groups.pop() if groups else Alone()
