"""nn.MultiheadAttention: its projections are layers, captured without a hook of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import (
    Anderson,
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    LocoProp,
    MirrorTarget,
    Newton,
    PostActivationLoss,
    Spectral,
    SquaredDistance,
)

GAMMA = 0.5
E = 6


class Attention(nn.Module):
    """An attention, called as its kind says, with a loss of its own."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind = kind
        self.attention = nn.MultiheadAttention(E, 2, dtype=torch.float64, **options)

    def forward(self, q, k, v):
        options = {"need_weights": "weights" in self.kind}
        if "self" in self.kind:
            return self.attention(q, q, q, **options)[0]
        if "encoder" in self.kind:
            return self.attention(q, key=k, value=k, **options)[0]
        if "equal" in self.kind:
            return self.attention(q, q + 1, q - 1, **options)[0]
        if "twice" in self.kind:
            return self.attention(q, q, q)[0] + self.attention(q, k, k)[0]
        if "masked" in self.kind:
            mask = torch.zeros(k.shape[1], k.shape[0], dtype=torch.bool)
            mask[:, -1] = True
            return self.attention(q, k, v[: len(k)], key_padding_mask=mask)[0]
        return self.attention(q, k, v, **options)[0]


KINDS = {
    "self": {},
    "self weights": {},
    "self batch first": {"batch_first": True},
    "self without bias": {"bias": False},
    "encoder": {},
    "encoder weights": {"batch_first": False, "bias": False},
    "separate": {},
    "equal": {},
    "twice": {},
    "masked": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.fixture(params=KINDS)
def case(request):
    torch.manual_seed(0)
    model = Attention(request.param, **KINDS[request.param])
    for p in model.parameters():  # biases begin at zero
        nn.init.normal_(p, std=0.3)
    q, k = torch.randn(5, 3, E, dtype=torch.float64), torch.randn(4, 3, E, dtype=torch.float64)
    return model, (q, k, torch.randn_like(k))


def step(model, inputs, optimizer):
    optimizer.zero_grad()
    model(*inputs).square().sum().backward()
    optimizer.step()


def solved(model, inputs, **options):
    model = copy.deepcopy(model)
    optimizer = LocoProp(model, activation_lr=GAMMA, fallback=lambda ps: torch.optim.SGD(ps, lr=0.0), **options)
    step(model, inputs, optimizer)
    return {name: p.detach() for name, p in model.attention.named_parameters()}


def projections(model, inputs):
    """Every projection's calls as (weight's name, its first unit, X, G), by reimplementing the call of F.linear."""
    calls = []
    linear = nn.functional.linear
    names = {p.data_ptr(): n for n, p in model.attention.named_parameters() if n.endswith("weight")}
    width = {name: p[0].numel() * p.element_size() for name, p in model.attention.named_parameters()}

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        for start, name in names.items():
            offset = weight.data_ptr() - start
            if 0 <= offset < len(dict(model.attention.named_parameters())[name]) * width[name]:
                call = [name, offset // width[name], x.detach().flatten(0, -2)]
                out.register_hook(lambda g, call=call: call.append(g.flatten(0, -2)))
                calls.append(call)
        return out

    nn.functional.linear = watched
    try:
        model(*inputs).square().sum().backward()
    finally:
        nn.functional.linear = linear
    return calls


def descended(model, inputs, lr, steps):
    """Plain gradient steps on Σ ½‖X W̃ᵀ + b̃ - (A - γG)‖² over the rows with a G, for every call, weights and biases."""
    model = copy.deepcopy(model)
    calls = [(name, first, x[g.any(1)], g[g.any(1)]) for name, first, x, g in projections(model, inputs)]
    old = {name: p.detach().clone() for name, p in model.attention.named_parameters()}
    new = {name: p.clone() for name, p in old.items()}
    separate = "q_proj_weight" in old
    learnt = {n: p for n, p in new.items() if n.endswith("proj_weight") or n.startswith("out") or n == "in_proj_bias"}
    if separate:
        learnt.pop("in_proj_bias", None)
    for _ in range(steps):
        grads = {name: torch.zeros_like(p) for name, p in learnt.items()}
        for name, first, x, g in calls:
            units = slice(first, first + g.shape[1])
            bias = name.replace("weight", "bias")
            delta = x @ (new[name][units] - old[name][units]).t() + GAMMA * g
            if bias in learnt:
                delta = delta + new[bias][units] - old[bias][units]
                grads[bias][units] += delta.sum(0)
            grads[name][units] += delta.t() @ x
        for name, grad in grads.items():
            new[name] -= lr * grad
    return {name: new[name] for name in new}


def sgd(**options):
    return FirstOrderSteps(torch.optim.SGD, schedule="constant", **options)


@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("gram", [False, True])
def test_first_order_steps(case, loss, gram, monkeypatch):
    monkeypatch.setattr("torchloco.problem.Size.prefers_gram", lambda self, *args: gram)
    model, inputs = case
    got = solved(model, inputs, lr=1e-3, local_steps=4, loss=loss, solver=sgd())
    assert_close(got, descended(model, inputs, 1e-3, 4))


def test_separate_widths():
    torch.manual_seed(0)
    model = Attention("separate", kdim=4, vdim=3)
    inputs = [torch.randn(n, 3, d, dtype=torch.float64) for n, d in ((5, E), (4, 4), (4, 3))]
    got = solved(model, inputs, lr=1e-3, local_steps=4, solver=sgd())
    assert_close(got, descended(model, inputs, 1e-3, 4))
    optimizer = LocoProp(model)
    assert [info.name for info in optimizer.layers] == [f"attention.{p}_proj" for p in ("q", "k", "v", "out")]
    assert optimizer.fallback_parameters == ["attention.in_proj_bias"]


def test_one_plain_step_is_sgd(case):
    model, inputs = case
    expected = copy.deepcopy(model)
    kept = [n for n in dict(model.named_parameters()) if "bias_k" in n or "bias_v" in n]
    params = [p for n, p in expected.named_parameters() if n not in kept]
    step(expected, inputs, torch.optim.SGD(params, 1e-2 * GAMMA))
    got = solved(model, inputs, lr=1e-2, local_steps=1, solver=sgd())
    assert_close(got, {n: p.detach() for n, p in expected.attention.named_parameters()}, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("make", [Exact, ConjugateGradient, Newton, Anderson])
def test_solvers_agree(case, make):
    """The minimum of a quadratic problem, in four ways, is what many small steps come to."""
    model, inputs = case
    options = {Exact: {"damping": 1e-14}, ConjugateGradient: {"iterations": 99, "tolerance": 0.0}}
    options |= {Newton: {"iterations": 9}, Anderson: {"memory": 9, "iterations": 99, "tolerance": 1e-12}}
    common = {"loss": "squared", "regularizer": SquaredDistance(5.0)}
    got = solved(model, inputs, solver=make(**options[make]), **common)
    expected = solved(model, inputs, solver=sgd(steps=400), lr=0.01, **common)
    assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_part_of_the_rows(case):
    model, inputs = case
    whole = solved(model, inputs, lr=1e-3, local_steps=3, loss="squared", solver=sgd())
    part = solved(model, inputs, lr=1e-3, local_steps=3, loss="squared", solver=sgd(local_rows=0.5))
    assert_close(part, whole, rtol=0.2, atol=0.02)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_transformer_trains_in_every_way():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1)
    optimizer = LocoProp(model, 1e-3)
    source, target = torch.randn(5, 3, 8), torch.randn(4, 3, 8)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(source, target) - target).square().mean()
        loss.backward()
        optimizer.step()
    names = [info.name for info in optimizer.layers]
    assert "decoder.layers.0.multihead_attn.in_proj" in names
    assert "encoder.layers.0.self_attn.out_proj" in names
    assert all("norm" in name for name in optimizer.fallback_parameters)
    infos = {info.name: info for info in optimizer.layers}
    assert infos["encoder.layers.0.self_attn.in_proj"].shape == (24, 8)
    assert infos["encoder.layers.0.linear1"].transfer.name == "relu"
    assert infos["decoder.layers.0.multihead_attn.in_proj"].transfer.name == "identity"


def test_copies_evaluation_and_memory():
    model = Attention("self")
    optimizer = LocoProp(model, 1e-3)
    x = torch.randn(5, 3, E, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin(x, x, x).sum().backward()
    with torch.no_grad():
        model(x, x, x)
    assert not any(layer.recorder.collected() for layer in optimizer._layers.values())
    twin.eval()(x, x, x)
    step(model, (x, x, x), optimizer)
    assert not any(layer.recorder.collected() for layer in optimizer._layers.values())
    optimizer.close()
    second = LocoProp(twin, 1e-3)  # the copied hooks are gone
    step(twin, (x, x, x), second)
    with pytest.raises(RuntimeError, match="another LocoProp"):
        LocoProp(twin)


def test_autocast_scaler_and_accumulation():
    torch.manual_seed(0)
    model = Attention("self").float()
    whole = copy.deepcopy(model)
    x = torch.randn(5, 4, E)
    optimizers = [LocoProp(m, 1e-3, local_steps=3, solver=sgd()) for m in (model, whole)]
    for half in x.split(2, dim=1):
        model(half, half, half).square().sum().backward()
    whole(x, x, x).square().sum().mul(64).backward()
    for p in whole.parameters():
        p.grad /= 64  # as a gradient scaler does
    for optimizer in optimizers:
        optimizer.step()
    assert_close(dict(model.named_parameters()), dict(whole.named_parameters()), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, x, x).square().sum()
    optimizers[0].zero_grad()
    loss.backward()
    optimizers[0].step()


def test_checkpointing_is_refused_by_name():
    model = Attention("self")
    optimizer = LocoProp(model, 1e-3)
    x = torch.randn(5, 3, E, dtype=torch.float64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, x, x, use_reentrant=False).sum().backward()
    with pytest.raises(RuntimeError, match="attention.in_proj.*activation checkpointing"):
        optimizer.step()
    optimizer.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, x, x, use_reentrant=True).sum().backward()
    optimizer.step()


def test_frozen_projections_and_resuming():
    model = Attention("self")
    model.attention.in_proj_weight.requires_grad_(False)
    optimizer = LocoProp(model, 1e-3)
    assert [info.name for info in optimizer.layers] == ["attention.out_proj"]
    inputs = [torch.randn(5, 3, E, dtype=torch.float64)] * 3
    step(model, inputs, optimizer)
    other = copy.deepcopy(model)
    second = LocoProp(other, 1e-3)
    second.load_state_dict(optimizer.state_dict())
    step(model, inputs, optimizer)
    step(other, inputs, second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_projections_have_groups_of_their_own():
    model = Attention("self")
    groups = [{"params": "attention.in_proj", "lr": 1e-3}, {"params": "attention.out_proj", "fallback": True}]
    optimizer = LocoProp(model, params=groups)
    assert [info.name for info in optimizer.layers] == ["attention.in_proj"]
    assert optimizer.fallback_parameters == ["attention.out_proj.weight", "attention.out_proj.bias"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("solver", [Exact(average=0.9), Spectral()], ids=["exact", "spectral"])
def test_averaged_second_moments_are_per_row_of_each_group(solver):
    """Queries and keys of different number: each group's C is divided by its own rows."""
    torch.manual_seed(0)
    model = Attention("encoder")
    q, k = (torch.randn(n, 3, E, dtype=torch.float64) for n in (7, 2))
    optimizer = LocoProp(model, 1e-3, loss="squared", solver=solver)
    step(model, (q, k, k), optimizer)
    (state,) = (s for s in optimizer.state_dict()["state"].values() if len(s["memory"]["solver"]["gram"]) > 1)
    for gram, x in zip(state["memory"]["solver"]["gram"], (q, k, k), strict=True):
        rows = nn.functional.pad(x.flatten(0, 1), (0, 1), value=1.0)
        assert_close(gram, rows.t() @ rows / len(rows))


def test_local_steps_in_low_precision_where_queries_and_keys_differ_in_number():
    """Groups with different numbers of rows have a mask, which is to follow the residuals' dtype."""
    ends = []
    for local_dtype in (None, torch.float32):
        torch.manual_seed(0)
        model = Attention("encoder")
        solver = FirstOrderSteps(torch.optim.SGD, local_dtype=local_dtype)
        optimizer = LocoProp(
            model, 0.01, loss=PostActivationLoss(), target=MirrorTarget(), local_steps=3, solver=solver
        )
        q, k = torch.randn(7, 3, E, dtype=torch.float64), torch.randn(5, 3, E, dtype=torch.float64)
        model(q, k, k).square().sum().backward()
        optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert_close(*ends, rtol=1e-4, atol=1e-6)
