"""Convolutions as matrix problems: a row is the patch under the window, or the layer's input itself for 1 × 1."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchloco.inputs import Dense, Inputs
from torchloco.layers.base import Layer, as_rows
from torchloco.windows import Geometry, TransposedWindows, Windows


class ConvolutionLayer(Layer):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`, with every stride, padding, dilation and number of groups g.

    N = batch · output places, d_in = C_in / g · ∏ kernel, d_out = C_out: the weight (C_out, C_in / g, *kernel) with its
    last axes taken together. Patches are never laid out all at once; a kernel of one entry needs none.
    """

    @property
    def units(self) -> int:  # type: ignore[override]
        """The channels, before the places."""
        return -1 - len(self._conv.kernel_size)

    @property
    def _conv(self) -> _ConvNd:
        return cast(_ConvNd, self.module)

    def inputs(self, x: Tensor, output: Tensor | None) -> Inputs:
        """The patches."""
        conv = self._conv
        x = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
        padding = _padding(conv)
        if set(conv.kernel_size) == {1} and conv.groups == 1 and not any(map(any, padding)):
            for i, step in enumerate(conv.stride):
                x = x.unfold(2 + i, 1, step).squeeze(-1)
            return Dense(as_rows(x.movedim(1, -1)))
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return Windows(x, Geometry(conv.kernel_size, conv.stride, conv.dilation, padding, mode, conv.groups))


class TransposedConvolutionLayer(ConvolutionLayer):
    """`nn.ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`.

    A is what the input's entries write, overlaps summed, and as such no product of rows. Seen from the output it is:
    N = batch · output places, a row is the patch of the input, spread by the stride, that an output entry is made of;
    d_in = C_in / g · ∏ kernel, d_out = C_out. The weight (C_in, C_out / g, *kernel) has its axes exchanged for it.
    """

    @property
    def d_out(self) -> int:
        """The number of units."""
        return self._conv.out_channels

    def inputs(self, x: Tensor, output: Tensor | None) -> Inputs:
        """The patches of the spread input."""
        conv = self._conv
        assert output is not None
        dims = len(conv.kernel_size)
        x = x if x.dim() == dims + 2 else x[None]
        padding, fill = [], 1.0
        for i in range(dims):
            reach = conv.dilation[i] * (conv.kernel_size[i] - 1)
            before = reach - cast(int, conv.padding[i])
            # An output_size given to forward() has chosen the output_padding.
            places = output.shape[i - dims]
            after = places + reach - before - (x.shape[2 + i] - 1) * conv.stride[i] - 1
            padding.append((before, after))
            fill *= min(1.0, x.shape[2 + i] / max(1, places))
        geometry = Geometry(
            conv.kernel_size, (1,) * dims, conv.dilation, tuple(padding), groups=conv.groups, spread=conv.stride
        )
        return TransposedWindows(x, geometry, fill)


def _padding(conv: _ConvNd) -> tuple[tuple[int, int], ...]:
    """What is added (before, after) in each dimension; "same" may add one more after than before."""
    sides = conv._reversed_padding_repeated_twice
    return tuple((sides[i], sides[i + 1]) for i in range(len(sides) - 2, -1, -2))


CONVOLUTIONS: dict[type[nn.Module], type[Layer]] = {
    nn.Conv1d: ConvolutionLayer,
    nn.Conv2d: ConvolutionLayer,
    nn.Conv3d: ConvolutionLayer,
    nn.ConvTranspose1d: TransposedConvolutionLayer,
    nn.ConvTranspose2d: TransposedConvolutionLayer,
    nn.ConvTranspose3d: TransposedConvolutionLayer,
}
