"""Data parallelism: rows that are spread over processes, with all that is summed over rows summed over all of them.

Under `DistributedDataParallel` each process (rank) sees its own rows and the mean gradient of all. If every sum over
rows in a local problem is one over the rows of all ranks, each solves the problem of the whole batch and arrives at the
same weights. A local step then costs one reduction of the size of the weight, as back-propagation does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchloco.inputs import Inputs
from torchloco.targets import LayerRows

if TYPE_CHECKING:
    from torchloco.capture import Recorder


class Alone:
    """The only process, which has the whole batch."""

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """See `Ranks.any`."""
        return flags

    @contextmanager
    def agreeing(self, device: torch.device) -> Iterator[list[str]]:
        """See `Ranks.agreeing`."""
        yield []  # nobody waits

    def share(self, all_rows: Sequence[LayerRows]) -> None:
        """See `Ranks.share`."""


@dataclass(frozen=True)
class Ranks(Alone):
    """The processes that share a batch.

    Args:
        group: Their process group.
    """

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
        """Which flags are set on any rank."""
        return [bool(flag) for flag in self.max(torch.tensor(flags, dtype=torch.int64, device=device)).tolist()]

    @contextmanager
    def agreeing(self, device: torch.device) -> Iterator[list[str]]:
        """Let all ranks go on or none: where one raises inside, the others raise too, and do not wait for it forever.

        Yields:
            A list for the names of what is to be solved for, which must be the same on all ranks.

        Raises:
            RuntimeError: Another rank raised, or has other names.
        """
        names: list[str] = []
        try:
            yield names
        except BaseException:
            self.max(torch.tensor([1, 0, 0], device=device))
            raise
        own = zlib.crc32("\n".join(names).encode())
        failed, largest, smallest = self.max(torch.tensor([0, own, -own], device=device)).tolist()
        if failed:
            raise RuntimeError("another rank refused this step, and says why; nothing was updated on any")
        if largest != -smallest:
            raise RuntimeError(
                f"the ranks have gradients and rows for different layers (here: {', '.join(names) or 'none'}); nothing "
                "was updated. Every layer must take part in the forward pass on all ranks or on none"
            )

    def share(self, all_rows: Sequence[LayerRows]) -> None:
        """Make each layer's rows those of all ranks' batch; called on all with the same layers."""
        if not all_rows:
            return
        counts = torch.tensor([rows.inputs.n for rows in all_rows], device=all_rows[0].g.device)
        fewest, totals = (-self.max(-counts)).tolist(), self.sum(counts).tolist()
        for rows, least, total in zip(all_rows, fewest, totals, strict=True):
            rows.inputs = SharedInputs(rows.inputs, self, total, least, rows.g.device)
            rows.g = rows.g / self.size  # the gradient is the mean of the ranks' own


class SharedInputs(Inputs):
    """The rows of one rank, whose sums are over the rows of all.

    Args:
        inputs: The rank's own rows.
        ranks: Who shares the batch.
        all_rows: How many rows all ranks have.
        fewest_rows: How many the rank has that has fewest.
        device: Where they are.
    """

    shared = True

    def __init__(self, inputs: Inputs, ranks: Ranks, all_rows: int, fewest_rows: int, device: torch.device) -> None:
        super().__init__(inputs.n, inputs.d_in, inputs.groups, inputs.fill)
        self._own, self._ranks = inputs, ranks
        self.all_rows, self.fewest_rows = all_rows, fewest_rows
        self.mask, self.takes_out, self._device = inputs.mask, inputs.takes_out, device

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
        return self._with(self._own.part(k, parts))

    def to(self, dtype: torch.dtype) -> SharedInputs:
        """See `Inputs.to`."""
        return self._with(self._own.to(dtype))

    def with_ones(self) -> SharedInputs:
        """See `Inputs.with_ones`."""
        return self._with(self._own.with_ones())

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

    def count_ones(self, bias: Tensor) -> Tensor:
        """See `Inputs.count_ones`."""
        return bias * self._counts.to(bias).repeat_interleave(len(bias) // self.groups)

    @cached_property
    def _counts(self) -> Tensor:
        """How many rows each group has, (g,)."""
        if self.mask is None:
            return torch.full((self.groups,), self.all_rows)
        return self.total(self.mask.sum(1))

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

    def _with(self, inputs: Inputs) -> SharedInputs:
        return SharedInputs(inputs, self._ranks, self.all_rows, self.fewest_rows, self._device)


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


def ranks_now() -> Alone:
    """Who shares the batch of the forward pass under way: those of the `DistributedDataParallel` that runs it.

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


def ranks_of(recorders: Sequence[Recorder], device: torch.device) -> Alone:
    """Who shares the batch of the layers' last passes; a layer that was called on one rank counts as called on all."""
    ranks = next((recorder.ranks for recorder in recorders if isinstance(recorder.ranks, Ranks)), Alone())
    called = ranks.any([recorder.called for recorder in recorders], device)
    for recorder, flag in zip(recorders, called, strict=True):
        recorder.called = flag
    return ranks
