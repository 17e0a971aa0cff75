"""In-place operations on a layer's output change nothing about the result."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp

OPERATIONS = {
    "ReLU(inplace=True)": (nn.ReLU(inplace=True), nn.ReLU(), "relu"),
    "F.relu(inplace=True)": (lambda a: F.relu(a, inplace=True), F.relu, "relu"),
    "tanh_": (torch.tanh_, torch.tanh, "tanh"),
    "LeakyReLU(inplace=True)": (nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    "mul_": (lambda a: a.mul_(0.5), lambda a: a * 0.5, "identity"),
    "add_ then tanh_": (lambda a: a.add_(1).tanh_(), lambda a: (a + 1).tanh(), "identity"),
}


class Net(nn.Module):
    def __init__(self, operation, bias):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
        self.second = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
        self.operation = operation

    def forward(self, x):
        return self.operation(self.second(self.operation(self.first(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_the_out_of_place_model(operation, loss, lead, bias, batches, train, values):
    in_place, out_of_place, transfer = OPERATIONS[operation]
    results, losses = [], []
    for function in (in_place, out_of_place):
        model = Net(function, bias)
        optimizer = LocoProp(model, lr=1e-2, loss=loss)
        losses.append(train(model, optimizer, batches(3, rows=lead)))
        assert [info.transfer.name for info in optimizer.layers] == [transfer, transfer]
        results.append(values(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert_close(*results, rtol=1e-10, atol=1e-13)
    assert not torch.equal(results[0]["first.weight"], Net(in_place, bias).first.weight), "nothing was trained"


def test_input_overwritten_before_the_step_is_refused(mlp, batches, values, same):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    before = values(model)
    x.zero_()
    with pytest.raises(RuntimeError, match="input of layer '0' was overwritten"):
        optimizer.step()
    assert same(values(model), before)
