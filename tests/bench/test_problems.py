"""The autoencoder is the published one, and its start depends on the seed alone."""

from math import sqrt

import pytest
import torch
from torch import nn

from locobench import problems
from locobench.errors import BenchError


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_standard_has_the_published_size_and_names():
    model = problems.build("standard", "tanh", 784, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    linears = _linears(model)
    assert list(linears) == [f"{half}.{n}" for half in ("encoder", "decoder") for n in (0, 2, 4, 6)]
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [linear.in_features for linear in linears.values()] == widths[:-1]
    assert [linear.out_features for linear in linears.values()] == widths[1:]
    assert len(model.encoder) == len(model.decoder) == 7, "code and output are linear"


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("deep", [256, 1000, 500, 500, 500, 250, 30]),
        ("wide", [256, 2000, 1000, 500, 60]),
        ("wide4", [256, 4000, 2000, 1000, 120]),
    ],
)
def test_variants(name: str, encoder: list[int]):
    linears = list(_linears(problems.build(name, "relu", 256, seed=0)).values())
    widths = encoder + encoder[-2::-1]
    assert [linear.in_features for linear in linears] == widths[:-1]
    assert [linear.out_features for linear in linears] == widths[1:]


def test_width_and_depth_multiply_those_of_the_model():
    def widths(*arguments: object, **sizes: int) -> list[int]:
        return [linear.out_features for linear in _linears(problems.build(*arguments, seed=0, **sizes)).values()]

    assert widths("standard", "tanh", 64, width=2) == widths("wide", "tanh", 64)
    assert widths("wide", "tanh", 64, width=2) == widths("wide4", "tanh", 64)
    assert widths("standard", "tanh", 64, depth=3) == widths("deep", "tanh", 64)
    assert widths("standard", "tanh", 64, depth=2)[:5] == [1000, 500, 500, 250, 30]


def test_same_seed_same_weights_whatever_happened_before():
    torch.manual_seed(1)
    first = problems.build("standard", "tanh", 64, seed=5).state_dict()
    torch.manual_seed(2)
    second = problems.build("standard", "relu", 64, seed=5).state_dict()
    other = problems.build("standard", "tanh", 64, seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_weights_and_biases_are_glorot_uniform():
    linear = problems.build("standard", "tanh", 784, seed=0).encoder[0]
    weight, bias = linear.weight.detach(), linear.bias.detach()
    for values, bound in ((weight, sqrt(6 / 1784)), (bias, sqrt(6 / 2000))):
        assert 0.98 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)


def test_loss_is_summed_over_pixels_and_averaged_over_images():
    logits, images = torch.zeros(7, 11), torch.rand(7, 11)
    assert problems.loss(logits, images).item() == pytest.approx(11 * torch.log(torch.tensor(2.0)).item())


def test_full_loss_does_not_depend_on_the_chunks():
    model, images = problems.build("standard", "tanh", 16, seed=0), torch.rand(10, 16)
    whole = problems.loss(model(images), images).item()
    assert problems.mean_loss(model, images, chunk=3) == pytest.approx(whole, rel=1e-6)


def test_unknown_names():
    with pytest.raises(BenchError, match="unknown model 'huge'.*standard"):
        problems.build("huge", "tanh", 784, seed=0)
    with pytest.raises(BenchError, match="unknown activation 'gelu'.*tanh, relu"):
        problems.build("standard", "gelu", 784, seed=0)
