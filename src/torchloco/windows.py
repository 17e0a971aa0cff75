"""The patches of a convolution as rows, by torch's own convolutions; they are laid out only some at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchloco.grouped import by_group
from torchloco.inputs import Dense, Grouped, Inputs

_BLOCK = 1 << 22
"""So many entries of patches are laid out at once, or those of one example."""

Options = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]
"""Those of torch's convolutions: stride, padding, dilation, transposed, output_padding, groups."""


@dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution are, as `torch.nn.Conv1d` … `Conv3d` say it, dimension by dimension.

    Args:
        kernel: The kernel's size.
        stride: From one window to the next.
        dilation: From one entry of a window to the next.
        padding: Entries (before, after); where that is negative entries are cut off.
        mode: Of the padding, as `torch.nn.functional.pad` names it.
        groups: In how many groups the channels are.
        spread: How far apart the input's entries are placed, with zeros between them (transposed convolutions).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"
    groups: int = 1
    spread: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """Of the space the windows move in: 1, 2 or 3."""
        return len(self.kernel)

    def padded(self, x: Tensor) -> Tensor:
        """The input with zeros between its entries and padding around them."""
        if any(step > 1 for step in self.spread):
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spread, strict=True)]
            spread = x.new_zeros(*x.shape[:2], *sizes)
            places = spread
            for i, step in enumerate(self.spread):
                places = places.unfold(2 + i, 1, step).squeeze(-1)
            places.copy_(x)
            x = spread
        if any(before or after for before, after in self.padding):
            x = pad(x, [entries for sides in reversed(self.padding) for entries in sides], self.mode)
        return x

    def windows(self, padded: Tensor) -> Tensor:
        """A view of the windows, (B, *L, C, *kernel)."""
        for i, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            padded = padded.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return padded.movedim(1, 1 + self.dims)


class Windows(Inputs):
    """The rows of a convolution: one for each place of the window, d_in = C / g · ∏ kernel entries each.

    Args:
        x: The layer's input, (B, C, *size).
        geometry: Where the windows are.
    """

    def __init__(self, x: Tensor, geometry: Geometry, fill: float = 1.0) -> None:
        before = x.shape[2:]
        if geometry.spread:
            before = torch.Size((size - 1) * step + 1 for size, step in zip(before, geometry.spread, strict=True))
        self.places = tuple(
            (size + sum(sides) - (kernel - 1) * dilation - 1) // stride + 1
            for size, sides, kernel, dilation, stride in zip(
                before, geometry.padding, geometry.kernel, geometry.dilation, geometry.stride, strict=True
            )
        )
        d_in = x.shape[1] // geometry.groups * math.prod(geometry.kernel)
        super().__init__(len(x) * math.prod(self.places), d_in, geometry.groups, fill)
        self.x, self.geometry = x, geometry

    def to(self, dtype: torch.dtype) -> Inputs:
        """See `Inputs.to`."""
        return type(self)(self.x.to(dtype), self.geometry, self.fill)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The patches of some examples."""
        places = math.prod(self.places)
        count = max(1, _BLOCK // max(1, places * self.d_in * self.groups))
        for start in range(0, max(1, len(self.x)), count):
            windows = self.geometry.windows(self.geometry.padded(self.x[start : start + count]))
            yield slice(start * places, (start + len(windows)) * places), self._rows(windows.flatten(0, self._dims))

    def part(self, k: int, parts: int) -> Inputs:
        """Only the patches of these rows are gathered; see `Inputs.part`."""
        rows = torch.arange(k, self.n, parts, device=self.x.device)
        patches = self.geometry.windows(self._padded)[torch.unravel_index(rows, (len(self.x), *self.places))]
        x = self._rows(patches)
        return Dense(x[0]) if self.groups == 1 else Grouped(x)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        channels = (len(weight), self.x.shape[1] // self.groups, *self.geometry.kernel)
        a = torch.convolution(self._padded, weight.reshape(channels), bias, *self._options)
        return a.movedim(1, -1).reshape(self.n, len(weight))

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        like = delta.new_empty(delta.shape[1], self.x.shape[1] // self.groups, *self.geometry.kernel)
        return self._weight_gradient(delta, self._padded, like, self._options).flatten(1)

    def _weight_gradient(self, delta: Tensor, x: Tensor, like: Tensor, options: Options) -> Tensor:
        g = delta.reshape(len(self.x), *self.places, delta.shape[1]).movedim(-1, 1)
        backward = torch.ops.aten.convolution_backward
        return backward(g, x, like, None, *options, (False, True, False))[1]  # type: ignore[no-any-return]

    @property
    def _dims(self) -> int:
        return self.geometry.dims

    @property
    def _options(self) -> Options:
        none = (0,) * self._dims
        return self.geometry.stride, none, self.geometry.dilation, False, none, self.groups

    @cached_property
    def _padded(self) -> Tensor:
        """The padded input, channels last where torch knows that: then rows need no copy."""
        return _channels_last(self.geometry.padded(self.x))

    def _rows(self, windows: Tensor) -> Tensor:
        """(n, C, *kernel) → (g, n, d_in)."""
        return windows.reshape(len(windows), self.groups, self.d_in).transpose(0, 1)


class TransposedWindows(Windows):
    """The rows of a transposed convolution: patches of the input with zeros between its entries.

    A is the overlapping sum of what each input entry writes. Seen from one output entry it is a product, too: of the
    patch that it lies under, in the input spread by the stride, with the kernel reversed. Here the patch is reversed
    instead, so that columns are in the order of the weight's entries. Products never visit the zeros.

    Args:
        x: The layer's input, (B, C_in, *size).
        geometry: Of the windows over the spread input; its `stride` is 1.
        fill: See `Inputs`.
    """

    def matrix(self, weight: Tensor) -> Tensor:
        """(C_in, C_out / g, *kernel) → (C_out, C_in / g · ∏ kernel)."""
        return by_group(weight, self.groups).transpose(1, 2).reshape(-1, self.d_in)

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """See `Inputs.shaped`."""
        units = len(matrix) // self.groups
        inner = (self.groups, units, shape[0] // self.groups, *self.geometry.kernel)
        return matrix.view(inner).transpose(1, 2).flatten(0, 1)

    def apply(self, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.apply`."""
        shaped = self.shaped(weight.contiguous(), self._shape(len(weight)))
        a = torch.convolution(self._input, shaped, bias, *self._transposed_options)
        return a.movedim(1, -1).reshape(self.n, len(weight))

    def sum(self, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See `Inputs.sum`."""
        like = delta.new_empty(self._shape(delta.shape[1]))
        return self.matrix(self._weight_gradient(delta, self._input, like, self._transposed_options))

    def _shape(self, units: int) -> torch.Size:
        return torch.Size((self.x.shape[1], units // self.groups, *self.geometry.kernel))

    @property
    def _transposed_options(self) -> Options:
        shape = self.geometry
        reach = [(kernel - 1) * dilation for kernel, dilation in zip(shape.kernel, shape.dilation, strict=True)]
        padding = [far - before for far, (before, _) in zip(reach, shape.padding, strict=True)]
        output_padding = [after - before for before, after in shape.padding]
        return shape.spread, padding, shape.dilation, True, output_padding, self.groups

    @cached_property
    def _input(self) -> Tensor:
        return _channels_last(self.x)

    def _rows(self, windows: Tensor) -> Tensor:
        return super()._rows(windows.flip(tuple(range(-self._dims, 0))))


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x
