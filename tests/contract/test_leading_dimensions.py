"""Leading dimensions are rows: a step on (…, d) is the step on the flattened (N, d)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("activation", [nn.Tanh, lambda: nn.ReLU(inplace=True)], ids=["tanh", "relu in place"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(12,), (3, 4), (2, 3, 2), (1, 12), (12, 1, 1)], ids=str)
def test_equals_flattened_rows(lead, bias, activation, loss, mlp, batches, train, values):
    shaped, flat = (mlp(activation=activation, bias=bias) for _ in range(2))
    data = batches(3, rows=lead)
    optimizers = [LocoProp(m, lr=1e-3, loss=loss) for m in (shaped, flat)]
    train(shaped, optimizers[0], data)
    train(flat, optimizers[1], [(x.reshape(-1, 6), y.reshape(-1, 3)) for x, y in data])
    assert [info.transfer.name for info in optimizers[0].layers] == [i.transfer.name for i in optimizers[1].layers]
    assert_close(values(shaped), values(flat), rtol=1e-9, atol=1e-12)


def test_a_single_row(mlp, batches, train, values):
    a, b = mlp(), mlp()
    data = batches(3, rows=())
    train(a, LocoProp(a, lr=1e-3), data)
    train(b, LocoProp(b, lr=1e-3), [(x[None], y[None]) for x, y in data])
    assert_close(values(a), values(b), rtol=1e-9, atol=1e-12)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "channels first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_non_contiguous_input(layout, bias, mlp, batches, train, values):
    a, b = (mlp(bias=bias) for _ in range(2))
    data = batches(3, rows=(3, 4))
    odd = [(LAYOUTS[layout](x), y) for x, y in data]
    assert not odd[0][0].is_contiguous()
    train(a, LocoProp(a, lr=1e-3), data)
    train(b, LocoProp(b, lr=1e-3), odd)
    assert_close(values(a), values(b), rtol=1e-9, atol=1e-12)


def test_expanded_input(mlp, batches, train, values):
    a, b = mlp(), mlp()
    [(x, y)] = batches(1, rows=(1, 4))
    y = y.expand(3, 4, 3)
    train(a, LocoProp(a, lr=1e-3), [(x.expand(3, 4, 6), y)])
    train(b, LocoProp(b, lr=1e-3), [(x.repeat(3, 1, 1), y)])
    assert_close(values(a), values(b), rtol=1e-9, atol=1e-12)


def test_several_shapes_in_one_step(mlp, batches, values):
    """Micro-batches may differ in their number of dimensions."""
    a, b = mlp(), mlp()
    [(x, y)] = batches(1, rows=12)
    optimizers = [LocoProp(m, lr=1e-3) for m in (a, b)]
    (nn.functional.mse_loss(a(x), y, reduction="sum")).backward()
    for part in (slice(0, 4), slice(4, 12)):
        lead = (4,) if part.start == 0 else (2, 2, 2)
        output = b(x[part].reshape(*lead, 6))
        nn.functional.mse_loss(output, y[part].reshape(*lead, 3), reduction="sum").backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_close(values(a), values(b), rtol=1e-9, atol=1e-12)


def rows_of(layout):
    """A model's input in that layout, and the same as a matrix."""
    torch.manual_seed(0)
    if layout == torch.jagged:
        sequences = [torch.randn(n, 6) for n in (3, 1, 4)]
        return torch.nested.nested_tensor(sequences, layout=layout), torch.cat(sequences)
    x = torch.randn(8, 6) * (torch.rand(8, 6) > 0.7)
    return x.to_sparse(layout=layout), x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.jagged, torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_jagged_and_sparse_inputs(layout, bias, values):
    results = []
    for x in rows_of(layout):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5, bias), nn.Tanh(), nn.Linear(5, 3, bias))
        optimizer = LocoProp(model, lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            y = model(x)
            (y.values() if y.layout == torch.jagged else y).square().mean().backward()
            optimizer.step()
        results.append(values(model))
    assert_close(*results, rtol=1e-6, atol=1e-7)
