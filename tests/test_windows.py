"""Convolutions are matrix products of their patches: rows gathered one by one, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from patches import as_rows, product, rows, weight_by_group
from torchloco.layers import layers_of

CONVOLUTIONS = [None, nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@st.composite
def convolutions(draw, transposed=False):
    """A convolution in float64 and an input for it."""
    dims = draw(st.sampled_from([1, 2, 3]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, sizes = each(1, 3), each(1, 2), each(3, 6 - dims)
    stride = each(1, 3)
    groups = draw(st.sampled_from([1, 2, 4]))
    options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans()), "dtype": torch.float64}
    channels = 4, 4 * draw(st.sampled_from([1, 2]))
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = each(0, 2)
        conv = TRANSPOSED[dims](*channels, kernel, stride, padding, output_padding, **options)
        places = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(sizes, stride, padding, dilation, kernel, output_padding, strict=True)
        ]
    else:
        padding = draw(st.sampled_from(["same", "valid", None]))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if padding is None:
            padding = each(0, 2)
        elif padding == "same":
            stride = (1,) * dims
            assume(all(d * (k - 1) < n for k, d, n in zip(kernel, dilation, sizes, strict=True)))
        conv = CONVOLUTIONS[dims](*channels, kernel, stride, padding, padding_mode=mode, **options)
        pads = conv._reversed_padding_repeated_twice[::-2]
        places = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(sizes, pads, dilation, kernel, strict=True)]
    assume(all(place > 0 for place in places))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return conv, torch.randn(2, channels[0], *sizes, generator=generator, dtype=torch.float64)


every = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def check_rows(module, x):
    """All that solvers ask of the rows, against the rows themselves."""
    output = module(x).detach()
    [layer] = layers_of("layer", module)
    inputs, expected = layer.inputs(x, output), rows(module, x, output)
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    groups, n, d_in = expected.shape
    assert (inputs.groups, inputs.n, inputs.d_in, layer.d_out) == (groups, n, d_in, as_rows(module, output).shape[1])
    matrix = inputs.matrix(weight)
    assert_close(matrix, weight_by_group(module, weight).flatten(0, 1))
    assert_close(inputs.shaped(matrix, weight.shape), weight)
    assert_close(product(module, expected, weight, bias), as_rows(module, output))  # the reference is right
    assert_close(layer.rows(output), as_rows(module, output))
    assert_close(inputs.apply(matrix, bias), as_rows(module, output))
    delta = torch.randn_like(layer.rows(output))
    assert_close(inputs.sum(delta), (delta.t().reshape(groups, -1, n) @ expected).flatten(0, 1))
    flat = expected[0] if groups == 1 else expected
    assert_close(inputs.dense(), flat)
    assert_close(inputs.gram(), flat.mT @ flat)
    assert_close(inputs.row_sum(), flat.sum(-2))
    assert_close(inputs.squares(), float(expected.square().sum()))
    parts = min(3, n)
    for k in range(parts):
        assert_close(inputs.part(k, parts).dense(), flat[..., k::parts, :])


@every
@given(convolutions())
def test_convolutions_are_their_patches(drawn):
    check_rows(*drawn)


@every
@given(convolutions(transposed=True))
def test_transposed_convolutions_are_patches_of_the_spread_input(drawn):
    check_rows(*drawn)


def test_blocks_are_small(monkeypatch):
    monkeypatch.setattr("torchloco.windows._BLOCK", 100)
    conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    x = torch.randn(7, 2, 5, 5, dtype=torch.float64)
    [layer] = layers_of("layer", conv)
    sizes = [block.numel() for _, block in layer.inputs(x, conv(x)).blocks()]
    assert sizes == [9 * 18] * 7  # an example at a time
    check_rows(conv, x)


def test_kernels_of_one_entry_are_not_unfolded():
    for stride in (1, 2):
        conv = nn.Conv2d(4, 3, 1, stride)
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        [layer] = layers_of("layer", conv)
        inputs = layer.inputs(x, conv(x))
        assert type(inputs).__name__ == "Dense"
        assert (inputs.x.data_ptr() == x.data_ptr()) == (stride == 1)
