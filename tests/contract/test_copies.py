"""Copies of a model are plain models; the original stays attached to its optimizer."""

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from torchloco import LocoProp


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "torch.save": saved_and_loaded,
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_inert(how, mlp, batches, train, values, same):
    alone, model = mlp(), mlp()
    data = batches(4)
    expected = train(alone, LocoProp(alone, lr=1e-3), data)

    optimizer = LocoProp(model, lr=1e-3)
    losses = train(model, optimizer, data[:2])
    clone = COPIES[how](model)
    before = values(clone)
    for x, y in data:  # neither the copy's passes nor a plain optimizer on it reach the original's optimizer
        torch.nn.functional.mse_loss(clone(x), y).backward()
    losses += train(model, optimizer, data[2:])

    assert losses == expected
    assert same(values(model), values(alone))
    assert same(values(clone), before)


@pytest.mark.parametrize("how", COPIES)
def test_copy_takes_its_own_optimizer(how, mlp, batches, train, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(2))
    clone = COPIES[how](model)
    second = LocoProp(clone, lr=1e-3)
    second.load_state_dict(optimizer.state_dict())
    later = batches(3, seed=5)
    assert train(model, optimizer, later) == train(clone, second, later)
    assert same(values(model), values(clone))


def test_averaged_model_follows_the_training(mlp, batches, train, values):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    average = AveragedModel(model)
    seen = []
    for batch in batches(3):
        train(model, optimizer, [batch])
        average.update_parameters(model)
        seen.append(values(model)["0.weight"])
    torch.testing.assert_close(average.module[0].weight.detach(), torch.stack(seen).mean(0))


def test_the_optimizer_itself_is_not_copied(mlp):
    optimizer = LocoProp(mlp())
    with pytest.raises(TypeError, match="copy the model, build a new LocoProp"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="save optimizer.state_dict"):
        torch.save(optimizer, io.BytesIO())
