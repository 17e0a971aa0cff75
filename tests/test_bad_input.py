"""Bad input: the message says what was got and what to do, and nothing is half done."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchloco import FirstOrderSteps, GradientTarget, LocoProp, Loss, PostActivationLoss, SquaredDistance, Transfer

# --- arguments --------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("lr", 0, "greater than 0"),
    ("lr", -1e-3, "greater than 0"),
    ("lr", math.nan, "got nan"),
    ("lr", math.inf, "finite, got inf"),
    ("activation_lr", 0.0, "greater than 0"),
    ("activation_lr", -10, "greater than 0"),
    ("activation_lr", math.nan, "got nan"),
    ("activation_lr", math.inf, "finite, got inf"),
    ("local_steps", 0, "at least 1, got 0"),
    ("local_steps", -3, "at least 1, got -3"),
]
WRONG_TYPE = [
    ("lr", "1e-3", "a number, got '1e-3' of type str"),
    ("lr", None, "a number, got None"),
    ("lr", True, "a number, got True"),
    ("activation_lr", [10], "a number, got"),
    ("local_steps", 2.5, "whole number .*, got 2.5 of type float"),
    ("local_steps", "10", "whole number .*, got '10'"),
    ("local_steps", True, "whole number"),
    ("local_steps", math.nan, "whole number"),
]
CASES = [(*case, ValueError) for case in OUT_OF_RANGE] + [(*case, TypeError) for case in WRONG_TYPE]


@pytest.mark.parametrize("through", ["constructor", "group", "add_param_group"])
@pytest.mark.parametrize(("option", "value", "message", "error"), CASES)
def test_numbers(option, value, message, error, through, mlp):
    model = mlp()
    group = {"params": ["2"], option: value}
    if through == "add_param_group":
        optimizer = LocoProp(model, params=["0"])
        with pytest.raises(error, match=f"{option} must be .*{message}"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        return
    options = {option: value} if through == "constructor" else {"params": [group]}
    with pytest.raises(error, match=f"{option} must be .*{message}"):
        LocoProp(model, **options)
    LocoProp(model)  # nothing was left behind


def test_numbers_as_tensors_are_fine(mlp, batches, train):
    model = mlp()
    train(model, LocoProp(model, lr=torch.tensor(1e-3)), batches(1))


def test_unknown_option_of_a_group(mlp):
    with pytest.raises(ValueError, match="'local_step'.*did you mean 'local_steps'.*supported"):
        LocoProp(mlp(), params=[{"params": "0", "local_step": 3}])


NAMES = [
    ({"loss": "matchin"}, ValueError, "'matchin'.*did you mean 'matching'.*squared"),
    ({"loss": "qqq"}, ValueError, "'qqq'.*known: matching, squared"),
    ({"loss": nn.MSELoss()}, TypeError, "'matching' or 'squared'.*Loss, got MSELoss"),
    ({"loss": None}, TypeError, "got None"),
    ({"output": "sigmod"}, ValueError, "'sigmod'.*did you mean 'sigmoid'"),
    ({"output": nn.BCELoss()}, TypeError, "BCELoss.*supported criteria.*cross-entropy"),
    ({"output": nn.L1Loss}, TypeError, "L1Loss.*supported criteria"),
    ({"output": F.l1_loss}, TypeError, "l1_loss.*supported criteria"),
    ({"output": 3}, TypeError, "3.*supported criteria"),
    ({"output": ["sigmoid"]}, TypeError, "supported criteria"),
    ({"transfers": {"0": "tahn"}}, ValueError, "'tahn'.*did you mean 'tanh'"),
    ({"transfers": {"0": nn.Tanh()}}, TypeError, "got Tanh"),
    (
        {"transfers": {"00": "tanh"}},
        ValueError,
        "'00'.*no supported layer.*did you mean '0'.*layers: 0, 2, 4",
    ),
    ({"transfers": {"1": "tanh"}}, ValueError, "'1'.*no supported layer.*0, 2, 4"),
    ({"target": "mirror"}, TypeError, "target must be a callable.*got 'mirror'"),
    ({"target": GradientTarget}, TypeError, "target must be a callable"),
    ({"loss": PostActivationLoss()}, ValueError, "no target goes with.*give target="),
    ({"regularizer": 0.1}, TypeError, r"regularizer must be an object with a method gradient\(new, old\), got 0.1"),
    ({"solver": 3}, TypeError, "torch.optim class or a factory.*got int"),
    ({"solver": "adam"}, TypeError, "torch.optim class or a factory.*got str"),
    ({"solver": torch.optim.LBFGS}, TypeError, "LBFGS.*closure.*use another"),
    ({"solver": lambda params, lr: params}, TypeError, "returned list, not a torch.optim.Optimizer"),
    ({"fallback": "adamw"}, TypeError, "fallback must be a torch.optim class or a factory.*got str"),
    ({"params": []}, ValueError, "params is empty"),
    ({"params": [3]}, TypeError, "parameters, modules.*names.*got int"),
    ({"params": [{"lr": 0.1}]}, TypeError, "dict with 'params'.*lr"),
    ({"params": ["first"]}, ValueError, "'first'.*no module.*supported layers: 0, 2, 4"),
    ({"params": [{"params": ["0"]}, {"params": ["2", "0"]}]}, ValueError, "another param group already"),
    ({"params": ["0", "0"]}, ValueError, "twice"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), NAMES, ids=lambda value: re.sub(" at 0x\\w+", "", str(value))[:50]
)
def test_arguments(options, error, message, mlp):
    model = mlp()
    with pytest.raises(error, match=message):
        LocoProp(model, **options)
    LocoProp(model)


@pytest.mark.parametrize("argument", ["solver", "fallback"])
def test_an_optimizer_instead_of_its_class(argument, mlp):
    model = mlp()
    made = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="class or a factory.*got AdamW"):
        LocoProp(model, **{argument: made})
    LocoProp(model)


def test_fallback_factory_that_makes_something_else():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError, match="fallback returned list, not a torch.optim.Optimizer"):
        LocoProp(model, fallback=list)
    LocoProp(model)


def test_fallback_that_needs_a_closure():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError, match="LBFGS.*closure"):
        LocoProp(model, fallback=torch.optim.LBFGS)
    LocoProp(model)


@pytest.mark.parametrize("wrong", [None, "model", torch.zeros(3), [nn.Parameter(torch.zeros(3))]])
def test_first_argument_is_the_model(wrong):
    with pytest.raises(TypeError, match=f"the model.*got {type(wrong).__name__}.*params="):
        LocoProp(wrong)


def test_parameters_instead_of_the_model(mlp):
    with pytest.raises(TypeError, match="the model.*got generator.*params="):
        LocoProp(mlp().parameters())


def test_parameters_of_another_model(mlp):
    model, other = mlp(), mlp()
    with pytest.raises(ValueError, match=r"parameter of shape \(5, 6\) that is not the model's"):
        LocoProp(model, params=other.parameters())
    with pytest.raises(ValueError, match="not the model's"):
        LocoProp(model, params=[other[0]])
    optimizer = LocoProp(model, params=["0"])
    with pytest.raises(ValueError, match="not the model's"):
        optimizer.add_param_group({"params": list(other[2].parameters())})
    assert len(optimizer.param_groups) == 1


UNSUPPORTED = {
    "no layers": lambda: nn.Sequential(nn.LayerNorm(4), nn.Embedding(3, 4)),
    "no parameters": lambda: nn.Tanh(),
    "all frozen": lambda: nn.Linear(4, 3).requires_grad_(False),
    "recurrence": lambda: nn.RNN(2, 2),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_model_without_supported_layers(kind):
    with pytest.raises(ValueError, match=r"no supported layer.*nn\.Linear.*torch\.optim"):
        LocoProp(UNSUPPORTED[kind]())


def test_layers_only_in_the_fallback_group(mlp):
    with pytest.raises(ValueError, match="no supported layer"):
        LocoProp(mlp(), params=[{"params": ["0", "2", "4"], "fallback": True}])


def test_lazy_modules():
    with pytest.raises(ValueError, match="'weight' is not initialised.*call the model once"):
        LocoProp(nn.LazyLinear(3))


def test_second_optimizer_on_a_part(mlp, batches, train):
    model = mlp()
    first = LocoProp(model)
    with pytest.raises(RuntimeError, match=r"another LocoProp.*close\(\)"):
        LocoProp(nn.Sequential(model[0], nn.Linear(5, 3)))
    train(model, first, batches(1))


# --- steps ------------------------------------------------------------------------------------------------------------


def everything(model, optimizer):
    """Copies of all parameters and of the optimizer's state."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(optimizer.state_dict()["state"])


def assert_unchanged(model, optimizer, before):
    parameters, state = before
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name]), name
    assert_same_state(optimizer.state_dict()["state"], state)


def assert_same_state(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture
def network(mlp):
    """Layers and fallback parameters."""
    return nn.Sequential(mlp(6, 5), nn.Tanh(), nn.LayerNorm(5, dtype=torch.float64), mlp(5, 4, 3, seed=1))


BAD_BATCHES = {
    "NaN in the input": lambda x, y: (x.index_fill(0, torch.tensor([2]), math.nan), y),
    "infinite input": lambda x, y: (x * math.inf, y),
    "NaN in the target": lambda x, y: (x, y * math.nan),
    "infinite target": lambda x, y: (x, y + math.inf),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_non_finite_gradients(steps_before, kind, network, batches, train, values, same):
    optimizer = LocoProp(network, lr=1e-3)
    good = batches(3)
    train(network, optimizer, good[:steps_before])
    optimizer.zero_grad()
    before = everything(network, optimizer)
    with pytest.raises(RuntimeError, match=r"gradient of .*0\.0\.weight.*not finite; nothing was updated"):
        train(network, optimizer, [BAD_BATCHES[kind](*good[2])])
    assert_unchanged(network, optimizer, before)
    train(network, optimizer, good[2:])
    assert not same(values(network), before[0])
    assert all(p.isfinite().all() for p in network.parameters())


def test_non_finite_gradient_of_one_parameter_names_it(network, batches):
    optimizer = LocoProp(network, lr=1e-3)
    [(x, y)] = batches(1)
    for name in ("3.0.bias", "2.weight"):
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()
        network.get_parameter(name).grad[1] = math.nan
        before = everything(network, optimizer)
        with pytest.raises(RuntimeError, match=f"the gradient of {name} is not finite") as caught:
            optimizer.step()
        assert "0.0.weight" not in str(caught.value)
        assert_unchanged(network, optimizer, before)


def test_the_step_after_a_refused_one_is_as_if_it_had_not_been(network, batches, train, values, same):
    other = copy.deepcopy(network)
    good, bad = batches(3), BAD_BATCHES["NaN in the target"]
    first, second = LocoProp(network, lr=1e-3), LocoProp(other, lr=1e-3)
    train(network, first, good)
    for batch in good:
        with pytest.raises(RuntimeError, match="not finite"):
            train(other, second, [bad(*batch)])
        train(other, second, [batch])
    assert same(values(network), values(other))


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_diverging_local_steps(loss, network, batches, train, values, same):
    optimizer = LocoProp(network, lr=1e-3, loss=loss, solver=FirstOrderSteps(torch.optim.SGD, momentum=0.9))
    data = batches(4)
    train(network, optimizer, data[:2])
    group = optimizer.param_groups[0]
    group["lr"] = 1e200
    before = values(network)
    fallback = copy.deepcopy({n: optimizer.state[network.get_parameter(n)] for n in optimizer.fallback_parameters})
    with pytest.raises(RuntimeError, match=r"local steps of .*3\.2.*diverged; all weights are as before.*Lower lr"):
        train(network, optimizer, data[2:3])
    assert same(values(network), before)
    assert_same_state({n: optimizer.state[network.get_parameter(n)] for n in optimizer.fallback_parameters}, fallback)
    group["lr"] = 1e-3
    train(network, optimizer, data[3:])
    assert not same(values(network), before)
    assert all(p.isfinite().all() for p in network.parameters())


def test_one_diverging_layer_is_named_alone(mlp, batches, train, values, same):
    model = mlp()
    groups = [{"params": ["0", "4"]}, {"params": "2", "lr": 1e200}]
    optimizer = LocoProp(model, lr=1e-3, solver=torch.optim.SGD, params=groups, transfers={"2": "identity"})
    before = values(model)
    with pytest.raises(RuntimeError, match="local steps of 2 diverged"):
        train(model, optimizer, batches(1))
    assert same(values(model), before)


def test_after_a_divergence_all_layers_begin_anew(mlp, batches, train, values, same):
    """Those that did not diverge may have taken in such gradients that they would never move again."""
    model, data = mlp(), batches(4)
    groups = [{"params": ["0", "4"]}, {"params": "2"}]
    options = {"lr": 1e-3, "solver": FirstOrderSteps(torch.optim.SGD, momentum=0.9), "transfers": {"2": "identity"}}
    optimizer = LocoProp(model, **options, params=groups)
    train(model, optimizer, data[:2])
    optimizer.param_groups[1]["lr"] = 1e200
    with pytest.raises(RuntimeError, match="local steps of 2 diverged"):
        train(model, optimizer, data[2:3])
    optimizer.param_groups[1]["lr"] = 1e-3
    other = mlp()
    other.load_state_dict(model.state_dict())
    train(model, optimizer, data[3:])
    train(other, LocoProp(other, **options), data[3:])
    assert same(values(model), values(other))


def test_state_dict_after_a_divergence(network, batches, train, values, same):
    """The state can still be saved, loaded and trained on."""
    optimizer = LocoProp(network, lr=1e200, solver=FirstOrderSteps(torch.optim.SGD, momentum=0.9))
    with pytest.raises(RuntimeError, match="diverged"):
        train(network, optimizer, batches(1))
    other = copy.deepcopy(network)
    second = LocoProp(other, lr=1.0, solver=FirstOrderSteps(torch.optim.SGD, momentum=0.9))
    second.load_state_dict(optimizer.state_dict())
    for one in (optimizer, second):
        one.param_groups[0]["lr"] = 1e-3
    train(network, optimizer, batches(2))
    train(other, second, batches(2))
    assert same(values(network), values(other))


def test_gradients_without_rows_because_built_too_late(mlp, batches, values, same):
    model = mlp()
    [(x, y)] = batches(1)
    F.mse_loss(model(x), y).backward()
    optimizer = LocoProp(model)
    before = values(model)
    with pytest.raises(RuntimeError, match="no captured rows: 0, 2, 4.*built before the forward pass"):
        optimizer.step()
    assert same(values(model), before)


def test_rows_cleared_between_backward_and_step(mlp, batches, values, same):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    F.mse_loss(model(x), y).backward()
    kept = {p: p.grad for p in model.parameters()}
    optimizer.zero_grad()
    for p, grad in kept.items():
        p.grad = grad
    before = values(model)
    with pytest.raises(RuntimeError, match=r"no captured rows.*zero_grad\(\) nor step\(\) called between"):
        optimizer.step()
    assert same(values(model), before)


@pytest.mark.parametrize("trained_before", [False, True])
def test_input_of_another_dtype(trained_before, network, batches, train, values, same):
    optimizer = LocoProp(network, lr=1e-3)
    if trained_before:
        train(network, optimizer, batches(2))
    optimizer.zero_grad()
    before = everything(network, optimizer)
    with pytest.raises(RuntimeError, match="(?i)same dtype|double|float"):
        train(network, optimizer, batches(1, dtype=torch.float32))
    assert_unchanged(network, optimizer, before)
    train(network, optimizer, batches(1))
    assert not same(values(network), before[0])


def test_input_on_another_device(mlp, batches, values, same):
    model = mlp()
    optimizer = LocoProp(model)
    before = values(model)
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)device|meta"):
        model(batches(1)[0][0].to("meta")).sum().backward()
    assert optimizer.step() is None
    assert same(values(model), before)


def test_input_of_another_width(mlp, batches, train, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    before = values(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(model, optimizer, batches(1, d_in=7))
    assert same(values(model), before)
    train(model, optimizer, batches(1))
    assert not same(values(model), before)


def test_target_rule_that_fails_at_a_later_layer(mlp, batches, train, values, same):
    """By then an earlier layer is solved; it must be as before."""

    def rule(rows):
        return rows.a if rows.name == "0" else rows.a[:1]

    model = mlp()
    optimizer = LocoProp(model, lr=1e-2, loss="squared", target=rule, regularizer=SquaredDistance(0.1))
    before = values(model)
    with pytest.raises(ValueError, match=r"layer '2'.*shape of the pre-activations \(8, 4\), got \(1, 4\)"):
        train(model, optimizer, batches(1))
    assert same(values(model), before)


def test_loss_that_fails_at_a_later_layer(mlp, batches, train, values, same):
    """The integral of a transfer is missing, and safe solves need it."""
    model = mlp(6, 5, 3, activation=nn.Tanh)
    last = Transfer("arctan", torch.atan)
    optimizer = LocoProp(model, lr=1e-2, safe=True, output=last)
    before = values(model)
    with pytest.raises(ValueError, match=r"integral of transfer 'arctan'.*Transfer\(integral="):
        train(model, optimizer, batches(1))
    assert same(values(model), before)


def test_group_edited_to_nonsense(mlp, batches, train, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3, params=[{"params": "0"}, {"params": ["2", "4"]}])
    optimizer.param_groups[1]["local_steps"] = 0
    before = values(model)
    with pytest.raises(ValueError, match="local_steps of a param group must be at least 1, got 0"):
        train(model, optimizer, batches(1))
    assert same(values(model), before)


def test_gradient_of_a_bias_alone(mlp, batches, values, same):
    model = mlp()
    optimizer = LocoProp(model)
    model[2].weight.requires_grad_(False)
    [(x, y)] = batches(1)
    F.mse_loss(model(x), y).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="bias of 2 has a gradient, the weight has none; freeze both"):
        optimizer.step()
    assert same(values(model), before)


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, "0.1"])
def test_strength_of_a_regularizer(wrong):
    with pytest.raises((ValueError, TypeError), match="strength must be"):
        SquaredDistance(wrong)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [("linaer", ValueError, "'linaer'.*linear, constant, cosine"), (3, TypeError, "callable.*got int")],
)
def test_schedule(schedule, error, message):
    with pytest.raises(error, match=message):
        FirstOrderSteps(schedule=schedule)


def test_value_of_a_loss_without_one():
    class Mine(Loss):
        def residual(self, a, target, transfer):
            return a - target

    with pytest.raises(NotImplementedError, match=r"Mine has no value\(\)"):
        Mine().value(torch.zeros(1, 1), torch.zeros(1, 1), Transfer("f", torch.tanh))
