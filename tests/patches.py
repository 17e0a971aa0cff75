"""What a convolution multiplies its weight by, gathered entry by entry: it shares no code with src/."""

import itertools

import torch
from torch import nn


def source(position, size, mode):
    """Which entry of a line a position outside it stands for, None for a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    return -position if position < 0 else 2 * (size - 1) - position  # reflect


def paddings(conv):
    """Entries before, in each dimension."""
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if conv.padding == "same":
        return [d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return conv.padding


def rows(module, x, output):
    """X by groups, (g, N, d_in), of a Linear, a convolution or a transposed convolution."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    groups, kernel, places = module.groups, module.kernel_size, output.shape[2:]
    patches = x.new_zeros(len(x), *places, x.shape[1], *kernel)
    geometry = list(zip(module.stride, paddings(module), module.dilation, strict=True))
    kernels = list(itertools.product(*map(range, kernel)))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        for place, k in itertools.product(itertools.product(*map(range, x.shape[2:])), kernels):
            written = tuple(i * s - p + j * d for i, j, (s, p, d) in zip(place, k, geometry, strict=True))
            if all(0 <= o < size for o, size in zip(written, places, strict=True)):
                patches[(slice(None), *written, slice(None), *k)] = x[(..., *place)]
    else:
        for place, k in itertools.product(itertools.product(*map(range, places)), kernels):
            read = [
                source(o * s - p + j * d, size, module.padding_mode)
                for o, j, size, (s, p, d) in zip(place, k, x.shape[2:], geometry, strict=True)
            ]
            if None not in read:
                patches[(slice(None), *place, slice(None), *k)] = x[(..., *read)]
    flat = patches.reshape(len(x) * torch.Size(places).numel(), groups, -1)
    return flat.transpose(0, 1)


def weight_by_group(module, weight):
    """The weight as matrices, (g, d_out / g, d_in)."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        inner = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return inner.flatten(3).flatten(2)
    groups = getattr(module, "groups", 1)
    return weight.unflatten(0, (groups, -1)).flatten(2)


def product(module, x, weight, bias):
    """A from the rows, (N, d_out)."""
    a = (x @ weight_by_group(module, weight).mT).transpose(0, 1).flatten(1)
    return a if bias is None else a + bias


def as_rows(module, output):
    """An output as rows, (N, d_out)."""
    return (output if isinstance(module, nn.Linear) else output.movedim(1, -1)).flatten(0, -2)
