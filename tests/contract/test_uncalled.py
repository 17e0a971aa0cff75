"""Layers whose weights are used without calling the module are the fallback's: said once, never skipped in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp


class ByWeight(nn.Module):
    """As Mamba's blocks of transformers, it calls `inner` by its weight alone."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(6, 5)
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.outer(x))
        return self.head(torch.tanh(nn.functional.linear(h, self.inner.weight, self.inner.bias)))


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def made(**options):
    torch.manual_seed(0)
    model = ByWeight().double()
    return model, LocoProp(model, 1e-4, **options), torch.randn(7, 6, dtype=torch.float64)


def test_it_takes_the_fallbacks_step_and_is_named_once():
    model, optimizer, x = made()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.inner.parameters())
    with pytest.warns(UserWarning, match=r"inner: the model uses the weight without calling.*AdamW\(lr=0.001\)"):
        step(model, optimizer, x)
    twin(x).square().sum().backward()
    adamw.step()
    assert_close(list(model.inner.parameters()), list(twin.inner.parameters()), rtol=0, atol=0)
    assert [info.name for info in optimizer.layers] == ["outer", "head"]
    assert optimizer.fallback_parameters == ["inner.weight", "inner.bias"]
    assert "fallback: AdamW(lr=0.001) for inner.weight, inner.bias" in repr(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [step(model, optimizer, x) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_beside_other_fallback_parameters_and_groups():
    torch.manual_seed(0)
    model = nn.Sequential(ByWeight(), nn.LayerNorm(3), nn.Linear(3, 3))
    optimizer = LocoProp(model, params=[{"params": model[0]}, {"params": [model[1], model[2]], "lr": 1e-4}])
    groups = [len(group["params"]) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match="0.inner"):
        step(model, optimizer, torch.randn(7, 6))
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    assert optimizer.fallback_parameters == ["1.weight", "1.bias", "0.inner.weight", "0.inner.bias"]


@pytest.mark.filterwarnings("ignore:inner")
def test_schedulers_that_were_there_before_go_on():
    model, optimizer, x = made(fallback=lambda ps: torch.optim.SGD(ps, lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for epoch in range(3):
        old = model.inner.weight.detach().clone()
        step(model, optimizer, x)
        assert_close(model.inner.weight, old - 0.1 * 0.5**epoch * model.inner.weight.grad)
        scheduler.step()


@pytest.mark.filterwarnings("ignore:inner")
def test_resumes_bit_for_bit():
    model, optimizer, x = made()
    for _ in range(3):
        step(model, optimizer, x)
    twin = copy.deepcopy(model)
    resumed = LocoProp(twin, 1e-4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer, x)
        step(twin, resumed, x)
    assert_close(list(twin.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_a_gradient_of_before_is_refused():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    x = torch.randn(4, 3)
    model[1](x).sum().backward()
    optimizer = LocoProp(model)
    model[0](x).sum().backward()
    with pytest.raises(RuntimeError, match="no captured rows: 1"):
        optimizer.step()


def test_a_pass_that_was_not_seen_at_all_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    loss = model(torch.randn(4, 3)).sum()
    optimizer = LocoProp(model)
    loss.backward()
    with pytest.raises(RuntimeError, match="must be built before the forward pass"):
        optimizer.step()
