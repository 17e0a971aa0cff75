"""Layers that a user registers, and weights that lie otherwise than nn.Linear's."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import (
    Anderson,
    ConjugateGradient,
    Dense,
    Exact,
    FirstOrderSteps,
    Inputs,
    Layer,
    LocoProp,
    Newton,
    Spectral,
    register_layer,
)
from torchloco.layers import _kinds
from torchloco.layers.dense import LinearLayer

GAMMA = 0.3  # targets stay within the range of tanh, so that minima exist


def sgd(**options):
    return FirstOrderSteps(torch.optim.SGD, schedule="constant", **options)


def test_one_layer_of_ones_own(monkeypatch):
    """A weight of another shape, its units not last, in an operator that knows its blocks alone."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

        def forward(self, x):
            return (x @ self.kernel).mT  # (B, units, L)

    class Halves(Inputs):
        def __init__(self, x):
            super().__init__(*x.shape)
            self.x = x

        def blocks(self):
            middle = self.n // 2
            yield slice(0, middle), self.x[None, :middle]
            yield slice(middle, self.n), self.x[None, middle:]

        def part(self, k, parts):
            return Dense(self.x[k::parts].contiguous())

        def to(self, dtype):
            return Halves(self.x.to(dtype))

        def matrix(self, weight):
            return weight.t()

        def shaped(self, matrix, shape):
            return matrix.t()

    class MixedLayer(Layer):
        weight_name, units = "kernel", -2

        @property
        def d_out(self):
            return self.weight.shape[1]

        def inputs(self, x, output):
            return Halves(x.flatten(0, -2))

    monkeypatch.setattr("torchloco.layers._kinds", {nn.Linear: LinearLayer})
    register_layer(Mixed, MixedLayer)
    torch.manual_seed(0)
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    model = nn.Sequential(Mixed(), nn.Tanh())
    same = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64), nn.Tanh())
    same[0].weight.data.copy_(model[0].kernel.t())
    for solver in (sgd(), sgd(local_rows=0.5), Newton(), Anderson()):
        for network in (model, same):
            optimizer = LocoProp(network, 1e-3, solver=solver)
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
            assert optimizer.layers[0].shape == (3, 4)
            optimizer.close()
        assert_close(model[0].kernel.t(), same[0].weight)


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


TRANSPOSED_SOLVERS = {
    "steps": lambda: sgd(),
    "some rows": lambda: sgd(local_rows=0.5),
    "low precision": lambda: sgd(local_dtype=torch.float32),
    "exact": lambda: Exact(0.1),
    "average": lambda: Exact(0.1, average=0.5),
    "cg": ConjugateGradient,
    "anderson": Anderson,
    "newton": Newton,
    "spectral": Spectral,
}


@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("solver", TRANSPOSED_SOLVERS)
def test_transposed_weights_are_solved_for_as_linear_ones(solver, loss, monkeypatch):
    if loss == "matching" and solver in ("exact", "average", "cg"):
        return
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).double()
    for k in (0, 2):
        model[k].weight.data.copy_(plain[k].weight.t())
        model[k].bias.data.copy_(plain[k].bias)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)  # of two micro-batches
    for network in (plain, model):
        optimizer = LocoProp(network, 1e-3, activation_lr=GAMMA, loss=loss, solver=TRANSPOSED_SOLVERS[solver]())
        for _ in range(2):
            optimizer.zero_grad()
            for part in x:
                network(part)[:, :-1].square().mean().backward()  # the last rows have no gradient
            optimizer.step()
        assert [info.shape for info in optimizer.layers] == [(5, 4), (3, 5)]
    for k in (0, 2):
        assert_close(model[k].weight.t(), plain[k].weight, rtol=1e-6, atol=1e-8)
        assert_close(model[k].bias, plain[k].bias, rtol=1e-6, atol=1e-8)


def test_registering_something_else_is_refused():
    with pytest.raises(TypeError, match="class of nn.Module first"):
        register_layer(nn.Linear(1, 1), LinearLayer)
    with pytest.raises(TypeError, match="class derived from torchloco.Layer second"):
        register_layer(nn.Linear, Dense)


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    class Wrong(LinearLayer):
        def inputs(self, x, output):
            return Dense(x[:, 0])

    monkeypatch.setattr("torchloco.layers._kinds", {})
    register_layer(nn.Linear, Wrong)
    model = nn.Linear(4, 3)
    optimizer = LocoProp(model)
    model(torch.randn(5, 6, 4)).square().sum().backward()
    with pytest.raises(RuntimeError, match="Wrong made 5 rows of its input and 30 of its output"):
        optimizer.step()


class Table(nn.Module):
    """Rows of a table, looked up by number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.bias = None

    def forward(self, x):
        return self.weight.t()[x]


class TableLayer(Layer):
    def inputs(self, x, output):
        return Dense(nn.functional.one_hot(x.flatten(), 5).to(self.weight.dtype))


def test_a_layer_may_take_numbers_of_things(monkeypatch):
    """Its input's dtype is then no precision."""
    monkeypatch.setitem(_kinds, Table, None)  # forgotten afterwards
    register_layer(Table, TableLayer)
    model = nn.Sequential(Table(), nn.Tanh(), nn.Linear(3, 2, dtype=torch.float64))
    expected = copy.deepcopy(model)
    x = torch.tensor([[0, 1], [4, 1]])
    expected(x).square().sum().backward()
    torch.optim.SGD(expected.parameters(), 0.2).step()
    optimizer = LocoProp(model, 0.1, activation_lr=2.0, local_steps=1, solver=torch.optim.SGD)
    model(x).square().sum().backward()
    optimizer.step()
    assert [info.name for info in optimizer.layers] == ["0", "2"]
    assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), rtol=1e-14, atol=1e-15)
