"""Backward passes that accumulate no gradient leave nothing behind; those through one forward pass add up."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchloco.transfers
from torchloco import FirstOrderSteps, LocoProp, Transfer, register_transfer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def build(model, **options):
    solver = FirstOrderSteps(torch.optim.SGD, schedule="constant")
    return LocoProp(model, 0.05, activation_lr=2.0, local_steps=4, solver=solver, output="identity", **options)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def plain_step(x):
    model = network()
    optimizer = build(model)
    model(x).square().mean().backward()
    optimizer.step()
    return parameters(model)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(7, 6, dtype=torch.float64)


def test_gradient_of_the_input_first(x):
    """As for adversarial examples and saliency maps."""
    model = network()
    optimizer = build(model)
    x.requires_grad_()
    loss = model(x).square().mean()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(parameters(model), plain_step(x.detach()), rtol=1e-12, atol=1e-14)


def test_gradients_assigned_by_hand(x):
    model = network()
    optimizer = build(model)
    loss = model(x).square().mean()
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = g
    optimizer.step()
    torch.testing.assert_close(parameters(model), plain_step(x), rtol=1e-12, atol=1e-14)


def test_two_backward_passes_through_one_forward(x):
    model = network()
    optimizer = build(model)
    loss = model(x).square().mean()
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    optimizer.step()
    torch.testing.assert_close(parameters(model), plain_step(x), rtol=1e-12, atol=1e-14)


def test_repeated_input_gradients_do_not_pile_up(x):
    model = network()
    optimizer = build(model)
    x.requires_grad_()
    for _ in range(5):
        torch.autograd.grad(model(x).sum(), x)
    assert sum(len(layer.recorder.collected()) for layer in optimizer._layers.values()) <= 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(x, reentrant):
    model = network()
    optimizer = build(model, transfers={"0": "tanh"})
    x.requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(parameters(model), plain_step(x.detach()), rtol=1e-12, atol=1e-14)


def test_checkpointed_part_is_followed_once(x):
    model = network()
    optimizer = build(model)
    h = checkpoint(model[0], x.requires_grad_(), use_reentrant=False)
    model[2](model[1](h)).square().mean().backward()
    optimizer.step()
    assert [info.transfer.name for info in optimizer.layers] == ["tanh", "identity"]


def test_discovery_recomputes_nothing(x):
    model = nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = build(model)
    checkpoint(model, x.requires_grad_(), use_reentrant=False).square().mean().backward()
    optimizer.step()
    assert len(calls) == 2
    assert [info.transfer.name for info in optimizer.layers] == ["softmax", "tanh", "identity"]


def test_weight_changed_after_the_forward_pass_is_refused(x):
    model = network()
    optimizer = build(model)
    model(x).square().mean().backward()
    with torch.no_grad():
        model[0].weight.add_(0.1)
    before = parameters(model)
    with pytest.raises(RuntimeError, match="'0' was changed or replaced"):
        optimizer.step()
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_replaced_weight_is_refused(x):
    model = network()
    optimizer = build(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match="weight of 0 was replaced"):
        optimizer.step()


def test_edited_bias_gradient_is_refused(x):
    model = network()
    optimizer = build(model)
    model(x).square().mean().backward()
    model[0].bias.grad.add_(1.0)
    with pytest.raises(RuntimeError, match="does not belong"):
        optimizer.step()


def test_step_under_autocast(x):
    """Local products keep their precision."""
    model = network().float()
    optimizer = build(model)
    model(x.float()).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    torch.testing.assert_close([p.double() for p in parameters(model)], plain_step(x), rtol=1e-4, atol=1e-6)


def test_clipping_is_recovered_in_bfloat16(x):
    model = network().bfloat16()
    optimizer = build(model)
    before = parameters(model)
    model(x.bfloat16()).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()
    for p, old in zip(parameters(model), before, strict=True):
        torch.testing.assert_close(p, old, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("follow", "expected"),
    [
        (lambda h: h / h.abs().sum(-1, keepdim=True), "identity"),
        (lambda h: h / (10 + h.abs()), "identity"),
        (lambda h: h / (1 + h.abs()), "softsign"),
        (lambda h: torch.log_softmax(h, -1) + 1, "identity"),
        (lambda h: nn.functional.elu(h, 1.5), "elu(1.5, scale=1)"),
    ],
)
def test_look_alikes(follow, expected, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(follow(self.a(x)))

    model = Model().double()
    optimizer = build(model)
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.layers[0].transfer.name == expected


def test_output_is_not_given_to_a_layer_called_alone(x):
    """Features taken before training do not decide what follows the layer in training."""
    model = network()
    optimizer = LocoProp(model, output="sigmoid")
    model[0](x)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert [info.transfer.name for info in optimizer.layers] == ["tanh", "sigmoid"]


class Cubic(nn.Module):
    def forward(self, x):
        return x**3


@pytest.mark.parametrize(("residual", "expected"), [(False, "cubic"), (True, "identity")])
def test_registered_module_beside_another_use(residual, expected, x, monkeypatch):
    monkeypatch.setattr(torchloco.transfers, "_registry", dict(torchloco.transfers._registry))
    monkeypatch.setattr(torchloco.registry, "_modules", dict(torchloco.registry._modules))
    register_transfer(Transfer("cubic", lambda a: a**3, integral=lambda a: a**4 / 4), Cubic)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.f, self.b = nn.Linear(6, 5), Cubic(), nn.Linear(5, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(self.f(h) + h if residual else self.f(h))

    model = Model().double()
    optimizer = build(model)
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.layers[0].transfer.name == expected


def test_state_of_another_optimizer_is_refused(x):
    model = network()
    optimizer = build(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="another kind of optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    assert optimizer.state_dict()["solvers"] == before["solvers"]


def test_closed_takes_no_group():
    model = network()
    optimizer = build(model, params=[{"params": "0"}])
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.add_param_group({"params": "2"})
