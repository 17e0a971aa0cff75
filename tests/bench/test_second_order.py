"""The second-order figure: its directions are what they are called, and LocoProp's update turns as the method says."""

import json
from pathlib import Path

import pytest
import torch
from commands import run
from torch import nn
from torch.func import functional_call, jacrev

from locobench import curvature, curves, problems, resemblance, series


@pytest.fixture
def model() -> problems.Autoencoder:
    torch.manual_seed(0)
    return problems.Autoencoder(4, [3, 2], "tanh").double()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.rand(12, 4, generator=torch.Generator().manual_seed(1)).double()


def blocks(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Every layer's dense Gauss-Newton block, weight and bias as one matrix of (d_out, d_in + 1), row by row."""
    found = []
    probabilities = model(batch).sigmoid().detach().flatten()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def logits(joined: torch.Tensor, name: str = name) -> torch.Tensor:
                changed = {f"{name}.weight": joined[:, :-1], f"{name}.bias": joined[:, -1]}
                return functional_call(model, changed, batch)

            joined = torch.cat([module.weight, module.bias[:, None]], 1).detach()
            jacobian = jacrev(logits)(joined).detach().reshape(len(probabilities), -1)
            weights = probabilities * (1 - probabilities) / len(batch)
            found.append(jacobian.t() @ (weights[:, None] * jacobian))
    return found


def test_gradients_are_autograds(model, batch):
    problems.loss(model(batch), batch).backward()
    modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer, module in zip(curvature.layers(model, batch), modules, strict=True):
        expected = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
        torch.testing.assert_close(layer.gradient, expected, rtol=1e-12, atol=1e-14)


def test_gauss_newton(model, batch, monkeypatch):
    monkeypatch.setattr(curvature, "_CG_TOLERANCE", 1e-10)
    found = curvature.layers(model, batch, samples=3000)
    for layer, block in zip(found, blocks(model, batch), strict=True):
        size = len(block)
        change = torch.randn(layer.gradient.shape, generator=torch.Generator().manual_seed(2)).double()
        product = layer.gauss_newton_product()(change)
        torch.testing.assert_close(product.flatten(), block @ change.flatten(), rtol=1e-9, atol=1e-12)
        assert layer.curvature == pytest.approx(float(block.trace()) / size, rel=0.03)  # it is sampled
        damped = block + 0.1 * layer.curvature * torch.eye(size).double()
        expected = torch.linalg.solve(damped, layer.gradient.flatten())
        directions, residual = layer.directions(0.1)
        assert residual < 1e-9
        torch.testing.assert_close(directions["gauss-newton"].flatten(), expected, rtol=1e-6, atol=1e-9)


def test_kfac_and_foof(model, batch):
    for layer in curvature.layers(model, batch):
        c, b = layer.x.t() @ layer.x, layer.fisher
        c = c + 0.1 * c.diagonal().mean() * torch.eye(len(c)).double()
        b = b + 0.1 * b.diagonal().mean() * torch.eye(len(b)).double()
        directions, _ = layer.directions(0.1)
        torch.testing.assert_close(directions["foof"] @ c, layer.gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b @ directions["kfac"] @ c, layer.gradient, rtol=1e-9, atol=1e-12)


def test_fisher_of_the_last_layer_is_known(model, batch):
    layer = curvature.layers(model, batch, samples=3000)[-1]
    probabilities = model(batch).sigmoid().detach()
    expected = (probabilities * (1 - probabilities)).mean(0).diag()
    torch.testing.assert_close(layer.fisher, expected, rtol=0.03, atol=0.003)


@pytest.fixture
def well_conditioned() -> tuple[problems.Autoencoder, torch.Tensor]:
    torch.manual_seed(0)
    model = problems.Autoencoder(4, [3], "tanh").double()
    for module in (model.encoder[0], model.decoder[0]):
        nn.init.orthogonal_(module.weight)
    return model, torch.rand(300, 4, generator=torch.Generator().manual_seed(1)).double()


def test_one_plain_step_is_the_gradient_and_many_are_foof(well_conditioned):
    rows = resemblance.measure(*well_conditioned, [1e-6], steps=[1, 30, 1000])
    for row in rows:
        for name in ("squared plain", "matching plain"):
            assert row["to_gradient"][name][0] == pytest.approx(1, abs=1e-12)
        (result,) = row["dampings"]
        first, some, many = result["updates"]["squared plain"]["foof"]
        assert first == pytest.approx(result["gradient"]["foof"], abs=1e-12)
        assert first < 0.9
        assert 0.9 < some < 0.9999 < many


def test_many_matching_steps_are_gauss_newton_in_the_last_layer(well_conditioned):
    """Its local problem has the curvature Xᵀ diag(p(1 - p)) X of each unit, which is the Gauss-Newton block's."""
    last = resemblance.measure(*well_conditioned, [1e-6], steps=[1000])[-1]
    (result,) = last["dampings"]
    cosines = result["updates"]["matching plain"]
    assert cosines["foof"][0] < 0.9995
    assert cosines["gauss-newton"][0] > 0.9999


TINY = ["figure", "second-order", "--threads", "1", "--batch-size", "20", "--warm-up", "2"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(curves, "TRAIN_IMAGES", 60)
    monkeypatch.setattr(curves, "TEST_IMAGES", 10)
    monkeypatch.setattr(problems, "_ENCODER", ([5], [], [3]))


@pytest.mark.usefixtures("tiny")
def test_command(tmp_path: Path):
    path = tmp_path / "deep" / "figure.png"
    result = run(*TINY, "--damping", "1,0.1", "--out", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.with_suffix(".json").read_text())
    assert f"written: {path.with_suffix('.json')}" in result.stdout
    assert (content["data"], content["batch_size"], content["seed"], content["dampings"]) == ("curves", 20, 0, [1, 0.1])
    assert {"versions", "machine", "steps", "fisher"} <= content.keys()
    assert [point["training_steps"] for point in content["points"]] == [0, 2]
    for point, carried in zip(content["points"], (False, True), strict=True):
        assert [row["layer"] for row in point["layers"]] == ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
        for row in point["layers"]:
            for result in row["dampings"]:
                assert result["updates"].keys() == set(series.SERIES) - (set() if carried else {"matching carried"})
                for by_kind in result["updates"].values():
                    assert by_kind.keys() == series.DIRECTIONS.keys()
                    assert all(len(cosines) == len(content["steps"]) for cosines in by_kind.values())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--damping", "0"], "--damping must be one to 3 positive numbers, got 0"),
        (["--damping", "1,nan"], "--damping must be one to 3 positive numbers, got 1,nan"),
        (["--damping", "1,2,3,4"], "--damping must be one to 3 positive numbers, got 1,2,3,4"),
        (["--damping", "high"], "--damping must be comma-separated numbers, got high"),
        (["--warm-up", -1], "--warm-up must be at least 0, got -1"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--batch-size", 31], "--batch-size 31 needs at least twice as many images, there are 60"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--out", "."], "--out must name the PNG, got ."),
        (["--out", "a.json"], "--out must name the PNG, got a.json"),
    ],
)
def test_refused(arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = run(*TINY, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() == f"locobench: {message}"
