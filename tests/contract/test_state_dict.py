"""A checkpoint resumes bit for bit, may be loaded more than once, and holds every tensor of the optimizer's state."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchloco import FirstOrderSteps, LocoProp, recipes

SOLVERS = {
    "paper": None,
    "Adam": torch.optim.Adam,
    "SGD with momentum": FirstOrderSteps(torch.optim.SGD, momentum=0.9),
    "SGD": torch.optim.SGD,
}


@pytest.fixture
def build(mlp):
    """A model with layers and fallback parameters, its optimizer and a scheduler over both."""

    def make(solver=None, dtype=torch.float64):
        model = nn.Sequential(mlp(6, 5), nn.Tanh(), nn.LayerNorm(5), mlp(5, 4, 3, seed=1)).to(dtype)
        optimizer = LocoProp(model, lr=1e-3, local_steps=4, solver=solver)
        return model, optimizer, LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))

    return make


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors(item)]


def run(train, model, optimizer, scheduler, data):
    losses = []
    for batch in data:
        losses += train(model, optimizer, [batch])
        scheduler.step()
    return losses


@pytest.mark.parametrize("solver", SOLVERS)
def test_bit_exact_resume(solver, build, batches, train, values, same):
    data = batches(8)
    straight = build(SOLVERS[solver])
    expected = run(train, *straight, data)

    first = build(SOLVERS[solver])
    losses = run(train, *first, data[:4])
    saved = through_a_file([part.state_dict() for part in first])
    resumed = build(SOLVERS[solver])
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    losses += run(train, *resumed, data[4:])

    assert losses == expected
    assert same(values(resumed[0]), values(straight[0]))
    assert [g["lr"] for g in resumed[1].param_groups] == [g["lr"] for g in straight[1].param_groups]


def test_loaded_after_some_training_of_its_own(build, batches, train, values, same):
    """The loaded state replaces what the optimizer had, inner and fallback state as well."""
    a, b = build(), build()
    run(train, *a, batches(3))
    run(train, *b, batches(2, seed=7))
    for part, other in zip(b, a, strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    later = batches(3, seed=3)
    assert run(train, *a, later) == run(train, *b, later)
    assert same(values(a[0]), values(b[0]))


def test_one_dict_loaded_twice(build, batches, train, values, same):
    source = build()
    run(train, *source, batches(3))
    state = copy.deepcopy(source[1].state_dict())
    untouched = copy.deepcopy(state)
    results = []
    for _ in range(2):
        model, optimizer, _ = build()
        model.load_state_dict(source[0].state_dict())
        optimizer.load_state_dict(state)
        train(model, optimizer, batches(4, seed=2))
        results.append(values(model))
    assert same(*results)
    assert state["param_groups"] == untouched["param_groups"]
    for a, b in zip(tensors(state), tensors(untouched), strict=True):
        assert torch.equal(a, b)


def test_saved_dict_is_read_by_load_only(build, batches, train):
    """Training on does not depend on the dict after loading: no tensor of it is shared."""
    source, target = build(), build()
    run(train, *source, batches(2))
    state = source[1].state_dict()
    target[1].load_state_dict(state)
    ours = {t.data_ptr() for t in tensors(target[1].state_dict()["state"]) if t.numel()}
    assert ours.isdisjoint(t.data_ptr() for t in tensors(state["state"]))


def test_another_dtype(build, batches, train):
    source = build()
    run(train, *source, batches(3))
    model, optimizer, _ = build(dtype=torch.float32)
    optimizer.load_state_dict(source[1].state_dict())
    slots = [t for t in tensors(optimizer.state_dict()["state"]) if t.dim()]
    assert slots
    assert {t.dtype for t in slots} == {torch.float32}
    before = model[0][0].weight.detach().clone()
    train(model, optimizer, batches(3, dtype=torch.float32))
    assert not torch.equal(model[0][0].weight, before)
    assert model[0][0].weight.isfinite().all()


@pytest.mark.parametrize("solver", ["paper", "Adam", "SGD with momentum"])
def test_every_tensor_is_in_the_state(solver, build, batches, train):
    """Each parameter has slots of its own shape, keyed by the parameter."""
    model, optimizer, _ = build(SOLVERS[solver])
    train(model, optimizer, batches(2))
    for name, p in model.named_parameters():
        shapes = [t.shape for t in tensors(optimizer.state[p])]
        assert p.shape in shapes, name
    saved = optimizer.state_dict()["state"]
    assert len(saved) == len(list(model.parameters()))


def test_model_cast_before_the_first_step(build, batches, train, values, same):
    a, optimizer_a, _ = build()
    b, optimizer_b, _ = build(dtype=torch.float32)
    a.to(torch.float32)
    b.load_state_dict(a.state_dict())
    a.to(torch.float64)
    b.to(torch.float64)
    assert train(a, optimizer_a, batches(3)) == train(b, optimizer_b, batches(3))
    assert same(values(a), values(b))


def test_model_cast_between_steps(mlp, batches, train):
    model = mlp(dtype=torch.float32)
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(2, dtype=torch.float32))
    model.to(torch.float64)
    before = model[0].weight.detach().clone()
    train(model, optimizer, batches(2))
    assert model[0].weight.dtype == torch.float64
    assert not torch.equal(model[0].weight, before)


def test_dict_of_another_model_is_refused(mlp, build, batches, train, values, same):
    model, optimizer, scheduler = build()
    run(train, model, optimizer, scheduler, batches(1))
    state, before = copy.deepcopy(optimizer.state_dict()), values(model)
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(LocoProp(mlp(6, 2)).state_dict())
    assert same(values(model), before)
    for a, b in zip(tensors(optimizer.state_dict()), tensors(state), strict=True):
        assert torch.equal(a, b)


def copied(value):
    """New dicts of new tensors, as Lightning makes them when it moves a state to its device."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_entries_of_the_state_may_be_replaced(solver, when, build, batches, train, values, same):
    """Training goes on with the new ones, and they are what is saved."""
    data = batches(6)
    straight, moved, resumed = (build(SOLVERS[solver]) for _ in range(3))
    expected = run(train, *straight, data)
    losses = run(train, *moved, data[:when])
    for p, entry in list(moved[1].state.items()):
        moved[1].state[p] = copied(entry)
    losses += run(train, *moved, data[when:4])
    for part, source in zip(resumed, moved, strict=True):
        part.load_state_dict(through_a_file(source.state_dict()))
    assert losses + run(train, *resumed, data[4:]) == expected
    assert same(values(resumed[0]), values(straight[0]))


def test_a_state_put_in_its_place_is_followed(build, batches, train, values, same):
    """Zeroed or edited entries count, as with torch's own optimizers."""
    results = []
    for edited in (False, True):
        model, optimizer, scheduler = build()
        data = batches(4)
        fresh = {p: copied(entry) for p, entry in optimizer.state.items()}
        start = values(model)
        run(train, model, optimizer, scheduler, data[:2] if edited else [])
        model.load_state_dict(start)
        if edited:
            optimizer.state.clear()
            optimizer.state.update(fresh)
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.param_groups[1]["lr"] = 1e-3
        losses = train(model, optimizer, data[2:])
        results.append((losses, values(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("outside", [False, True])
def test_state_of_a_solver_with_lr_elsewhere_is_refused(outside, mlp, batches, train, values, same):
    """Its momentum is in other units: taken for one's own, the steps would be 1 / lr times too long, or too short."""
    saving = LocoProp(mlp(), solver=FirstOrderSteps(lr_outside=outside))
    model = mlp()
    loading, before = LocoProp(model, solver=FirstOrderSteps(lr_outside=not outside)), values(model)
    with pytest.raises(ValueError, match="with lr outside"):
        loading.load_state_dict(saving.state_dict())
    assert same(values(model), before)


def test_state_of_another_target_is_refused(mlp, values, same):
    """Its γ has another meaning."""
    model = mlp()
    saved = recipes.locoprop_m_normalized(mlp()).state_dict()
    optimizer, before = recipes.locoprop_m(model, paper=False), values(model)
    with pytest.raises(ValueError, match="saved by target NormalizedTarget of MirrorTarget, .*has target MirrorTarget"):
        optimizer.load_state_dict(saved)
    assert same(values(model), before)
    assert optimizer.param_groups[0]["activation_lr"] == 10.0
