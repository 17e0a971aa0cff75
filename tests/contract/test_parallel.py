"""With parallel=True layers are solved at the same time, and nothing else is different."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchloco import LocoProp, MirrorTarget, recipes
from torchloco.parallel import at_a_time, each

SIZES = (60, 90, 40, 90, 60)


@pytest.fixture(autouse=True)
def two_threads():
    """Of torch's, whatever the tests run with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Seen(MirrorTarget):
    """The paper's target, which takes down in which threads, modes and numbers of threads it is asked for."""

    def __init__(self):
        self.calls = {}

    def __call__(self, rows):
        self.calls[rows.name] = (
            threading.current_thread(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
        return super().__call__(rows)


@pytest.fixture
def trained(mlp, batches, train, values):
    """A model's weights and losses after some steps."""

    def run(build=LocoProp, dtype=torch.float64, **options):
        model = mlp(*SIZES, dtype=dtype)
        optimizer = build(model, **options)
        losses = train(model, optimizer, batches(4, rows=70, d_in=60, d_out=60, dtype=dtype))
        return values(model), losses, optimizer

    return run


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (LocoProp, {"lr": 1e-3}),
        (LocoProp, {"lr": 1e-3, "loss": "squared", "safe": True}),
        (recipes.locoprop_m_normalized, {"lr": 1e-3}),
        (recipes.locoprop_s_exact, {"activation_lr": 1.0}),
    ],
)
def test_the_weights_are_those_of_one_layer_after_the_other(trained, build, options):
    one, losses, _ = trained(build, **options)
    other, others, _ = trained(build, **options, parallel=True)
    assert others == pytest.approx(losses, rel=1e-9)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


def test_layers_are_solved_in_threads_of_their_own_as_step_would(trained):
    target = Seen()
    trained(target=target, parallel=True, loss="matching", solver=torch.optim.SGD)
    assert set(target.calls) == {"0", "2", "4", "6"}
    assert all(call[1:] == (1, False, False, False) for call in target.calls.values())
    assert threading.main_thread() not in {call[0] for call in target.calls.values()}
    assert not any(call[0].is_alive() for call in target.calls.values())
    assert torch.get_num_threads() == 2


def test_by_default_nothing_leaves_the_thread(trained):
    target = Seen()
    trained(target=target, solver=torch.optim.SGD)
    assert {call[0] for call in target.calls.values()} == {threading.current_thread()}


class Wrong(MirrorTarget):
    """Raises in one layer."""

    def __call__(self, rows):
        if rows.name == "2":
            raise KeyError("layer 2")
        return super().__call__(rows)


def test_an_error_of_one_layer_is_raised_and_no_weight_is_changed(mlp, batches, train, values, same):
    model = mlp(*SIZES)
    before = values(model)
    optimizer = LocoProp(model, target=Wrong(), parallel=True)
    with pytest.raises(KeyError, match="layer 2"):
        train(model, optimizer, batches(1, rows=70, d_in=60, d_out=60))
    assert same(values(model), before)
    assert torch.get_num_threads() == 2


def test_it_is_an_attribute_that_repr_tells(mlp):
    optimizer = LocoProp(mlp(*SIZES), parallel=True)
    assert optimizer.parallel
    assert "parallel: several layers are solved at the same time" in repr(optimizer)
    optimizer.parallel = False
    assert "parallel" not in repr(optimizer)


def test_what_is_no_bool_is_refused(mlp):
    for wrong in (1, 4, None, "yes"):
        with pytest.raises(TypeError, match=f"parallel must be True or False, got {wrong!r}"):
            LocoProp(mlp(), parallel=wrong)


def test_after_steps_in_parallel_everything_can_still_be_copied_and_saved(trained):
    _, _, optimizer = trained(parallel=True)
    state = optimizer.state_dict()
    assert pickle.loads(pickle.dumps(state)).keys() == copy.deepcopy(state).keys()


def test_under_a_dispatch_mode_it_stays_where_the_mode_sees_it(trained):
    target = Seen()
    with FlopCounterMode(display=False):
        trained(target=target, parallel=True)
    assert {call[0] for call in target.calls.values()} == {threading.current_thread()}


@pytest.mark.parametrize(
    ("costs", "threads", "expected"),
    [
        ([1, 1], 1, 1),
        ([1, 1], 2, 2),
        ([5, 1, 1], 2, 1),  # one layer is most of the work
        ([784, 500, 125, 8, 8, 125, 500, 784], 2, 2),
        ([784, 500, 125, 8, 8, 125, 500, 784], 4, 4),
        ([784, 500, 125, 8, 8, 125, 500, 784], 16, 4),  # with four threads each
        ([1, 1, 1], 2, 1),  # in the end one thread alone
        ([1, 1], 3, 1),
        ([0, 0], 2, 2),
        ([], 2, 2),
    ],
)
def test_how_many_at_a_time(costs, threads, expected):
    assert at_a_time(costs, threads) == expected


@given(st.lists(st.integers(-100, 100), max_size=12))
def test_each_keeps_the_order(items):
    assert each(lambda item: item * 2, items, [abs(item) for item in items]) == [item * 2 for item in items]


def test_of_several_errors_the_first_items_is_raised():
    def fail(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        each(fail, range(6), [1] * 6)


def test_inference_mode_goes_along():
    with torch.inference_mode():
        assert each(lambda _: torch.is_inference_mode_enabled(), range(4), [1] * 4) == [True] * 4


def test_whether_subnormals_are_flushed_goes_along():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        halves = each(lambda _: (torch.tensor(1e-38) / 2).item(), range(4), [1] * 4)
    finally:
        torch.set_flush_denormal(False)
    assert halves == [0.0] * 4


def test_layers_of_one_size_of_a_model_trained_in_a_thread(mlp, batches, train):
    """As trainers do."""
    model = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(30, 30), nn.Tanh())][:-1])
    optimizer = LocoProp(model, lr=1e-3, parallel=True)
    thread = threading.Thread(
        target=train, args=(model, optimizer, batches(3, rows=40, d_in=30, d_out=30, dtype=torch.float32))
    )
    before = model[0].weight.detach().clone()
    thread.start()
    thread.join()
    assert not torch.equal(model[0].weight, before)
