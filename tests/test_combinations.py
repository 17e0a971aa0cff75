"""Loss × target × regularizer × solver: every legal combination lowers its local objective, the others are refused."""

import itertools

import pytest
import torch
from torch import nn

from torchloco import (
    Anderson,
    Bounded,
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    GradientTarget,
    LocoProp,
    MatchingLoss,
    MirrorTarget,
    MomentumTarget,
    Newton,
    NormalizedTarget,
    PostActivationLoss,
    ProximalStep,
    RelativeEntropy,
    SquaredDistance,
    SquaredLoss,
    WeightDecay,
    get_transfer,
)
from torchloco.problem import LocalProblem
from torchloco.safety import solve_safely
from torchloco.solvers import Task
from torchloco.targets import LayerRows


class Pull:
    """A user's regularizer, with no base class."""

    def gradient(self, new, old):
        return 0.01 * new**3

    def value(self, new, old):
        return 0.01 * (new**4).sum() / 4


def user_target(rows):
    return 0.9 * rows.y - 0.1 * rows.g.sign()


LOSSES = {"squared": SquaredLoss(), "matching": MatchingLoss(), "post-activation": PostActivationLoss()}
TARGETS = {
    "gradient": GradientTarget(),
    "mirror": MirrorTarget(),
    "normalized": NormalizedTarget(MirrorTarget()),
    "momentum": MomentumTarget(0.9, GradientTarget()),
    "user's": user_target,
}
REGULARIZERS = {
    "none": None,
    "distance": SquaredDistance(0.1),
    "decay": WeightDecay(0.05),
    "entropy": RelativeEntropy(0.5),
    "distance+decay": SquaredDistance(0.1) + WeightDecay(0.05),
    "user's": Pull(),
    "user's+decay": Pull() + WeightDecay(0.05),
}
SOLVERS = {
    "steps": FirstOrderSteps(torch.optim.SGD, schedule="constant"),
    "exact": Exact(1e-6),
    "conjugate": ConjugateGradient(),
    "anderson": Anderson(),
    "newton": Newton(),
    "proximal": ProximalStep(),
}
QUADRATIC = ("none", "distance", "decay", "distance+decay")
CONVEX = ("squared", "matching")


def is_legal(loss, regularizer, solver):
    return {
        "steps": True,
        "exact": loss == "squared" and regularizer in QUADRATIC,
        "conjugate": loss == "squared" and regularizer in QUADRATIC,
        "anderson": loss in CONVEX and regularizer in QUADRATIC,
        "newton": loss in CONVEX and regularizer in QUADRATIC,
        "proximal": regularizer in ("distance", "entropy"),
    }[solver]


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_task(loss, target, regularizer, transfer="tanh", rows=30, d_in=5, d_out=3, safe=False, bias=True):
    """A layer of positive weights (for the entropy) on random rows, with gradients as autograd would give them."""
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(0.05 + 0.3 * draw(*p.shape, seed=k).abs())
    x, g = draw(rows, d_in, seed=2), 0.1 * draw(rows, d_out, seed=3)
    a = layer(x).detach()
    params = list(layer.parameters())
    problem = LocalProblem(
        rows=LayerRows("layer", x, a, g, get_transfer(transfer), 1.0),
        loss=loss,
        target=target,
        regularizer=regularizer,
        weight=params[0].detach().clone(),
        bias=params[1].detach().clone() if bias else None,
        learn_bias=bias,
        gradients=[g.t() @ x, g.sum(0)] if bias else [g.t() @ x],
    )
    return Task(problem, params, lrs=[1e-3] * len(params), steps=20, safe=safe)


def solve(solver, task):
    task.inner = solver.attach(task.params, task.lrs[0])
    with torch.no_grad():
        (solve_safely if task.safe else (lambda s, t: s.solve(t)))(solver, task)


LEGAL, ILLEGAL = [], []
for names in itertools.product(LOSSES, TARGETS, REGULARIZERS, SOLVERS):
    (LEGAL if is_legal(names[0], names[2], names[3]) else ILLEGAL).append(names)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize(("loss", "target", "regularizer", "solver"), LEGAL)
def test_a_legal_combination_lowers_its_objective(loss, target, regularizer, solver, safe):
    task = make_task(LOSSES[loss], TARGETS[target], REGULARIZERS[regularizer], safe=safe)
    if solver == "proximal":
        # The proximal step minimises a linear model of the loss, which holds for short steps.
        task.problem.regularizer = type(REGULARIZERS[regularizer])(300.0)
    before = task.problem.value(task.problem.old).item()
    SOLVERS[solver].check(LOSSES[loss], task.problem.regularizer)
    solve(SOLVERS[solver], task)
    after = task.problem.value(task.values).item()
    assert after < before
    assert all(p.grad is None for p in task.params)


@pytest.mark.parametrize(
    ("loss", "regularizer", "solver"), sorted({(loss, regularizer, solver) for loss, _, regularizer, solver in ILLEGAL})
)
def test_an_illegal_combination_is_refused_by_name(loss, regularizer, solver):
    with pytest.raises(ValueError, match=f"{type(SOLVERS[solver]).__name__} .*; (use|give) ") as error:
        LocoProp(
            nn.Linear(2, 2),
            loss=LOSSES[loss],
            target=GradientTarget() if loss == "squared" else MirrorTarget(),
            regularizer=REGULARIZERS[regularizer],
            solver=SOLVERS[solver],
        )
    fine = CONVEX if solver in ("anderson", "newton") else ("squared",)
    blame_loss = solver != "proximal" and loss not in fine
    assert repr(LOSSES[loss] if blame_loss else REGULARIZERS[regularizer]) in str(error.value)


# --- the minimum is one --------------------------------------------------------------------------------------------

LONG = {
    "SGD": lambda: FirstOrderSteps(torch.optim.SGD, steps=1500, schedule="constant"),
    "SGD with momentum": lambda: FirstOrderSteps(torch.optim.SGD, steps=400, schedule="constant", momentum=0.9),
    "Adam": lambda: FirstOrderSteps(torch.optim.Adam, steps=1500, schedule="cosine"),
    "exact": lambda: Exact(1e-14),
    "exact, averaged": lambda: Exact(1e-14, average=0.9),
    "conjugate gradients": lambda: ConjugateGradient(60, tolerance=1e-14),
    "Anderson": lambda: Anderson(5, 100, tolerance=1e-14),
    "Newton": lambda: Newton(12, damping=1e-9),
    "Newton by conjugate gradients": lambda: Newton(20, damping=1e-9, direct=0, conjugate_gradients=60),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [30, 4], ids=["tall", "wide"])
@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("transfer", ["tanh", "sigmoid", "softplus", "softmax", "leaky_relu", "identity"])
def test_every_solver_ends_at_the_same_weights(loss, transfer, rows, bias):
    regularizer = SquaredDistance(0.3) + WeightDecay(0.2)  # strongly convex: one minimum
    target = GradientTarget() if loss == "squared" else MirrorTarget()
    ends = {}
    for name, make in LONG.items():
        solver = make()
        if loss == "matching" and isinstance(solver, Exact | ConjugateGradient):
            continue
        task = make_task(LOSSES[loss], target, regularizer, transfer, rows=rows, bias=bias)
        task.lrs = [3e-2 if name == "SGD" else 1e-2] * len(task.params)
        solve(solver, task)
        ends[name] = [p.detach().clone() for p in task.params]
        assert task.problem.gradient(ends[name])[0].norm() < (1e-5 if name == "Adam" else 1e-8), name
    reference = ends["Newton"]
    for name, end in ends.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "Adam" else {"rtol": 1e-7, "atol": 1e-8}
        torch.testing.assert_close(end, reference, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_newton_converges_quadratically():
    """The gradient's norm is about squared by each iteration, once it is small."""
    norms = []
    for iterations in range(1, 7):
        task = make_task(MatchingLoss(), MirrorTarget(), SquaredDistance(0.3))
        task.problem.rows.activation_lr = 5.0
        solve(Newton(iterations, damping=1e-14), task)
        norms.append(task.problem.gradient(task.values)[0].norm().item())
    exponents = [
        torch.tensor(c / b).log() / torch.tensor(b / a).log()
        for a, b, c in zip(norms, norms[1:], norms[2:], strict=False)
        if c > 1e-13
    ]
    assert norms[-1] < 1e-12
    assert exponents[-1] > 1.7


def test_anderson_needs_fewer_gradients_than_steps():
    """On the same number of gradients Anderson is far nearer to the minimum than plain gradient steps."""
    distances = {}
    for name, solver in {
        "steps": FirstOrderSteps(torch.optim.SGD, steps=10, schedule="constant"),
        "Anderson": Anderson(5, 10),
    }.items():
        task = make_task(MatchingLoss(), MirrorTarget(), SquaredDistance(0.1))
        c = task.problem.gram
        task.lrs = [float(1 / torch.linalg.eigvalsh(c)[-1])] * 2
        solve(solver, task)
        distances[name] = task.problem.gradient(task.values)[0].norm().item()
    assert distances["Anderson"] < 0.05 * distances["steps"]


# --- outer rules and safe solving in the whole optimizer -------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, torch.optim.SGD, Anderson(), Newton(), "squared exact", "squared conjugate"])
@pytest.mark.parametrize("outer", [None, Bounded(0.1), torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("safe", [False, True])
def test_every_solver_trains_with_every_outer_rule(solver, outer, safe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    loss = "matching"
    if isinstance(solver, str):
        loss, solver = "squared", Exact(1e-2) if "exact" in solver else ConjugateGradient()
    regularizer = SquaredDistance(0.5)
    optimizer = LocoProp(
        model, 1e-3, loss=loss, regularizer=regularizer, solver=solver, outer=outer, safe=safe, activation_lr=3.0
    )
    x = draw(40, 6, seed=0)
    y = torch.stack([x[:, :2].sum(1).tanh(), x[:, 2] * x[:, 3]], 1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = nn.functional.mse_loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


SMOOTH = ["tanh", "sigmoid", "softmax", "softsign", "softplus"]


@pytest.mark.parametrize(
    ("solver", "transfer"),
    [(solver, transfer) for solver in (Newton(), Newton(direct=0)) for transfer in [*SMOOTH, "hardtanh", "relu"]]
    + [(Anderson(), transfer) for transfer in SMOOTH],
    ids=repr,
)
@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])
def test_convex_solvers_descend_from_saturated_weights(solver, transfer, scale):
    for seed in range(4):
        task = make_task(MatchingLoss(), MirrorTarget(), None, transfer, rows=40)
        with torch.no_grad():
            for k, p in enumerate(task.params):
                p.copy_(scale * draw(*p.shape, seed=10 * seed + k))
        problem = task.problem
        problem.weight, problem.bias = (p.detach().clone() for p in task.params)
        problem.rows.a = problem.rows.x @ problem.weight.t() + problem.bias
        problem.rows.g = 0.1 * (problem.rows.y - get_transfer(transfer)(draw(40, 3, seed=seed)))
        problem.gradients = [problem.rows.g.t() @ problem.rows.x, problem.rows.g.sum(0)]
        task.safe = isinstance(solver, Anderson) and scale > 3  # leaving saturation, Anderson is known to rise
        before = problem.value(problem.old).item()
        solve(solver, task)
        after = problem.value(task.values).item()
        assert after <= before + 1e-12 * abs(before), (seed, before, after)
