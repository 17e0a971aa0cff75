"""The figure of the local losses shows what the method says of them."""

import pytest
import torch
from commands import refused, run

from locobench import figures
from locobench.unit_loss import unit_losses
from torchloco import MatchingLoss, get_transfer


def value(name: str, prediction: float, target: float) -> float:
    predictions = torch.tensor([prediction], dtype=torch.float64)
    return unit_losses(MatchingLoss(), get_transfer(name), predictions, target).item()


def test_relu_is_indifferent_below_zero():
    assert value("relu", -2.0, -0.5) == 0
    assert value("relu", 1.0, -0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid", "softplus", "elu"])
def test_zero_at_the_target_and_positive_elsewhere(name):
    for target in (-2.0, 0.5):
        assert value(name, target, target) == pytest.approx(0, abs=1e-12)
        assert value(name, 3.0, target) > 0


def test_command(tmp_path):
    path = tmp_path / "deep" / "figure.png"
    result = run("figure", "local-losses", "--transfers", "tanh, relu", "--out", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["gelu", "softmax", "tnah"])
def test_refused(name, tmp_path):
    with pytest.raises(figures.BenchError):
        figures.local_losses([name], tmp_path / "figure.png")


def test_a_path_that_is_no_picture_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "figure", tmp_path / "figure.txt"):
        assert f"--out must name the PNG, got {path}" in refused("figure", "local-losses", "--out", path)
    assert not list(tmp_path.iterdir())
