"""The documentation runs as it stands, its tables are true, and its examples are the algorithms they are said to be."""

import copy
import io
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import torchloco
from torchloco import (
    Anderson,
    GradientTarget,
    LayerRows,
    LocoProp,
    MatchingLoss,
    MirrorTarget,
    MomentumTarget,
    NormalizedTarget,
    PostActivationLoss,
    RelativeEntropy,
    Size,
    SquaredDistance,
    SquaredLoss,
    Transfer,
    WeightDecay,
    get_transfer,
    transfers,
)
from torchloco.problem import LocalProblem
from torchloco.solvers import Task

# The tables' rows are tried with every target, whether it belongs to the loss or not.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not belong to:UserWarning")

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What a file's blocks take for granted, made anew before each of them.
PREAMBLES = {
    "README.md": """
import torch
from collections import OrderedDict
from torch import nn

torch.manual_seed(0)
parts = {"encoder": nn.Linear(6, 5), "decoder": nn.Sequential(nn.Tanh(), nn.Linear(5, 4)), "head": nn.Linear(4, 3)}
model = nn.Sequential(OrderedDict(parts))
criterion = nn.BCEWithLogitsLoss()
loader = [(torch.randn(8, 6), torch.rand(8, 3)) for _ in range(3)]
"""
}


def blocks(path):
    """The Python blocks of a Markdown file, each moved down to its line so that errors name it."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text[: match.start(1)].count("\n") + match[1]


def run(path):
    """The names that a file's blocks have defined, in order."""
    names = {}
    for block in blocks(path):
        exec(PREAMBLES.get(path.name, ""), names)
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def registry():
    """What the documentation registers is known to this module alone."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(transfers, "_registry", dict(transfers._registry))
        patch.setattr(torchloco.registry, "_modules", dict(torchloco.registry._modules))
        patch.setattr(torchloco.layers, "_kinds", dict(torchloco.layers._kinds))
        yield


@pytest.fixture(scope="module")
def doc(registry):
    """What the snippets of extending.md define."""
    return run(ROOT / "docs" / "extending.md")


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "extending.md"], ids=lambda path: path.name)
def test_blocks_run(path):
    run(path)


def test_extending_runs(doc):
    assert doc["both_factors"] < doc["input_factor"] < 0.5
    assert doc["train"](solver=torch.optim.SGD, activation_lr=1.0, local_steps=1, lr=1.0)[0] > 2 * doc["both_factors"]


# --- a batch, a model, a step ----------------------------------------------------------------------------------------


def batch(seed, rows=7, d_in=5, d_out=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    return x, torch.rand(rows, d_out, generator=generator, dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def layer():
    return nn.Sequential(network()[0])


def half_squares(a, y):
    return (a - y).square().sum() / 2


def step(model, optimizer, seed=0, criterion=nn.functional.mse_loss, **sizes):
    x, y = batch(seed, **sizes)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def after(model, make, steps=3, **options):
    """The weights of a copy of the model after some steps of the optimizer that `make` builds for it."""
    model = copy.deepcopy(model)
    optimizer = make(model)
    for seed in range(steps):
        step(model, optimizer, seed, **options)
    return weights(model)


def joined_inputs(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


# --- the worked example -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40, 4], ids=["tall", "wide"])
def test_the_worked_example_is_k_fac(doc, rows):
    """W - γ (S + λI)⁻¹ ∂L/∂W (A + λ′I)⁻¹ with running means S of N²·ggᵀ and A of xxᵀ, written out with inverses."""
    gamma, decay, damping = 0.3, 0.9, 0.2
    ours = network()
    optimizer = LocoProp(
        ours,
        activation_lr=gamma,
        loss="squared",
        target=doc["KroneckerTarget"](),
        solver=torchloco.Exact(damping, average=decay),
    )
    theirs = network()
    moments = {}
    for seed in range(4):
        x, y = batch(seed, rows)
        a1 = theirs[0](x)
        h = a1.tanh()
        a2 = theirs[2](h)
        loss = nn.functional.mse_loss(a2, y)
        gs = torch.autograd.grad(loss, [a1, a2])
        with torch.no_grad():
            for linear, rows_in, g in zip([theirs[0], theirs[2]], [x, h], gs, strict=True):
                xs = joined_inputs(rows_in)
                now = [rows * g.t() @ g, xs.t() @ xs / rows]
                past = moments.get(linear, now)
                s, c = moments[linear] = [decay * p + (1 - decay) * n for p, n in zip(past, now, strict=True)]
                left = torch.linalg.inv(s + (s.diagonal().mean() + 1e-12) * torch.eye(len(s), dtype=s.dtype))
                right = torch.linalg.inv(c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype))
                change = gamma * left @ (g.t() @ xs) @ right
                linear.weight -= change[:, :-1]
                linear.bias -= change[:, -1]
        step(ours, optimizer, seed, rows=rows)
    assert_close(weights(ours), weights(theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("choice", ["squared", "matching"])
def test_the_worked_example_trains_and_resumes(doc, choice):
    def build():
        model = network()
        solver = torchloco.Exact(0.1, average=0.9) if choice == "squared" else Anderson()
        target = doc["KroneckerTarget"]()
        return model, LocoProp(model, loss=choice, target=target, solver=solver, activation_lr=0.02)

    model, optimizer = build()
    x, y = batch(0, 40)
    before = nn.functional.mse_loss(model(x), y).item()
    for _ in range(20):
        step(model, optimizer, rows=40)
    assert nn.functional.mse_loss(model(x), y).item() < 0.7 * before
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    other, resumed = build()
    for part, state in zip([other, resumed], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for pair in [(model, optimizer), (other, resumed)]:
        step(*pair, 1, rows=40)
    assert_close(weights(other), weights(model), rtol=0, atol=0)


def test_the_worked_example_without_a_gradient(doc):
    model = network()
    old = weights(model)
    optimizer = LocoProp(model, loss="squared", target=doc["KroneckerTarget"](), solver=torchloco.Exact())
    (0 * model(batch(0)[0])).sum().backward()
    optimizer.step()
    assert_close(weights(model), old, rtol=0, atol=0)


# --- the other examples -----------------------------------------------------------------------------------------------


def layer_rows(gamma=2.0, rows=6):
    x, a, g = (batch(k, rows)[0] for k in range(3))
    return LayerRows("layer", x, a, g, get_transfer("tanh"), gamma)


def residuals_of_one_step(monkeypatch, target, loss):
    """How often one plain step asks the loss for its residual."""
    calls = []
    residual = type(loss).residual
    monkeypatch.setattr(type(loss), "residual", lambda self, *args: calls.append(1) or residual(self, *args))
    model = layer()
    step(
        model,
        LocoProp(model, loss=loss, target=target, activation_lr=0.5, local_steps=1, transfers={"0": "tanh"}),
        d_out=4,
    )
    return len(calls)


@pytest.mark.parametrize("loss", [SquaredLoss(), MatchingLoss()], ids=["squared", "matching"])
def test_whose_first_gradient_is_free(loss, doc, monkeypatch):
    own = {"squared": GradientTarget(), "matching": MirrorTarget()}[loss.name]
    for target in (own, NormalizedTarget(), doc["LimitedTarget"]()):
        assert residuals_of_one_step(monkeypatch, target, loss) == 0
    for target in (MomentumTarget(), doc["ClippedTarget"](), doc["KroneckerTarget"](), doc["reachable_target"]):
        assert residuals_of_one_step(monkeypatch, target, loss) == 1


def test_targets_by_hand(doc):
    rows = layer_rows()
    limited = doc["LimitedTarget"](GradientTarget())
    assert (limited(rows) - rows.a).abs().max().item() == pytest.approx(1.0)
    rows.g = 0.01 * rows.g
    assert_close(limited(rows), rows.a - 2.0 * rows.g)
    lengths = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 8.0], dtype=torch.float64)  # the mean is 2
    rows.g = nn.functional.normalize(rows.g) * lengths[:, None]
    asked = (rows.y - doc["ClippedTarget"](MirrorTarget())(rows)).norm(dim=1)
    assert_close(asked, 2.0 * lengths.clamp(max=4.0))
    assert doc["reachable_target"](rows).abs().max() <= 1
    inside = doc["reachable_target"](rows).abs() < 1
    assert_close(doc["reachable_target"](rows)[inside], (rows.y - 2.0 * rows.g)[inside])


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5,)])
def test_spectral_descent(shape, doc):
    """Its step has all singular values alike, and is the minimum of the linear model with the penalty."""
    penalty = doc["SpectralDistance"](2.0)
    old, gradient, other = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = penalty.proximal(gradient, old) - old

    def objective(move):
        return (gradient * move).sum() + penalty.value(old + move, old)

    matrix = change.view(len(change), -1)
    nuclear = torch.linalg.matrix_norm(gradient.view(len(gradient), -1), "nuc")
    assert_close(torch.linalg.svdvals(matrix), torch.full((min(matrix.shape),), nuclear / 2, dtype=torch.float64))
    for size in (1e-3, 0.1, 1.0):
        assert objective(change) < objective(change + size * other)
    assert_close(objective(change), -(nuclear**2) / 4)
    new = (old + other).requires_grad_()
    (expected,) = torch.autograd.grad(penalty.value(new, old), new)
    assert_close(penalty.gradient(new.detach(), old), expected)


def make_task(steps, gamma=0.3):
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, dtype=torch.float64)
    params = list(linear.parameters())
    x, g = batch(1, 30)[0], batch(2, 30)[1] - 0.5
    old = [p.detach().clone() for p in params]
    problem = LocalProblem(
        rows=LayerRows("layer", x, linear(x).detach(), g, get_transfer("tanh"), gamma),
        loss=MatchingLoss(),
        target=MirrorTarget(),
        regularizer=None,
        weight=old[0],
        bias=old[1],
        learn_bias=True,
        gradients=[g.t() @ x, g.sum(0)],
    )
    xs = joined_inputs(x)
    return Task(
        problem, params, lrs=[1e-3] * 2, steps=steps, memory={"v": torch.linalg.eigh(xs.t() @ xs)[1][:, -1:].t()}
    )


@torch.no_grad()
def test_accelerated_steps_reach_the_minimum_and_keep_their_vector(doc):
    norms = []
    for steps in (10, 1000):
        task = make_task(steps)
        before = task.problem.value(task.problem.old)
        doc["Accelerated"]().solve(task)
        assert task.problem.value(task.values) < before
        assert_close(task.keep["v"], task.memory["v"])  # an eigenvector stays
        norms.append(task.problem.gradient(task.values)[0].norm().item())
    assert norms[1] < 1e-9 < norms[0]


def test_trust_ratio_is_lars(doc):
    """One plain step turned into ratio · ‖w‖ · g / ‖g‖."""
    model = network()
    old = weights(model)
    x, y = batch(0)
    grads = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
    outer = doc["TrustRatio"](0.05)
    solver = torch.optim.SGD
    got = after(model, lambda m: LocoProp(m, 0.1, activation_lr=1, local_steps=1, solver=solver, outer=outer), 1)
    assert_close(got, [w - 0.05 * w.norm() * g / g.norm() for w, g in zip(old, grads, strict=True)])


# --- rows of the table of algorithms ----------------------------------------------------------------------------------


ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


def table(first):
    """The rows of the table whose first heading is `first`, as lists of cells."""
    lines = ALGORITHMS[ALGORITHMS.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


CHOICES = {row[0]: re.match(r"`(.*?)`", row[1])[1] for row in table("algorithm")}


def choose(name, doc, **names):
    """What makes the optimizer of a row, as the table has it."""

    def make(model):
        own = {**vars(torchloco), "torch": torch, **doc, "model": model}
        return eval(CHOICES[name], {**own, **names})

    return make


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_an_optimizer(name, doc):
    numbers = {"lr": 0.01, "decay": 0.1, "momentum": 0.9, "damping": 0.1, "activation_lr": 0.1, "ratio": 0.01}
    criterion = nn.functional.binary_cross_entropy_with_logits
    assert all(w.isfinite().all() for w in after(network(), choose(name, doc, **numbers), criterion=criterion))


def test_every_test_that_is_named_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE))
    named = set(re.findall(r"\b(test_\w+)(?!\w*\.py)\b", ALGORITHMS))
    assert len(named) > 20
    assert named <= defined
    assert all(re.findall(r"test_\w+", row[4]) for row in table("algorithm"))


def test_every_source_is_listed():
    listed = ALGORITHMS[ALGORITHMS.index("## Sources") :]
    for row in table("algorithm"):
        for author, year in re.findall(r"(\w+)[^;]*? (\d{4})", row[3]):
            assert re.search(rf"^- [^.]*{author}(?s:.(?!\n- ))*{year}", listed, re.MULTILINE), (author, year)


def test_weight_decay_is_sgds(doc):
    got = after(network(), choose("SGD with L2 penalty", doc, lr=0.2, decay=0.3))
    assert_close(got, after(network(), lambda m: torch.optim.SGD(m.parameters(), 0.2, weight_decay=0.3)))


def test_one_step_of_adam_is_adam(doc):
    got = after(network(), choose("Adam, or another torch.optim class", doc, lr=0.01))
    assert_close(got, after(network(), lambda m: torch.optim.Adam(m.parameters(), 0.01)))


def test_outer_adamw_of_one_plain_step_is_adamw(doc):
    got = after(network(), choose("Adam, AdamW, Muon, … as the outer optimizer", doc, lr=0.01))
    expected = after(network(), lambda m: torch.optim.AdamW(m.parameters(), 0.01))
    assert_close(got, expected, rtol=1e-6, atol=1e-8)  # W - (W - G) rounds, and Adam divides by √v


def test_outer_sgd_looks_ahead(doc):
    old = weights(network())
    fast = after(network(), lambda m: LocoProp(m, 1e-3), 1)
    slow = after(network(), choose("Lookahead", doc, lr=1e-3), 1)
    assert_close(slow, [w + 0.5 * (f - w) for w, f in zip(old, fast, strict=True)])


@pytest.mark.parametrize("space", ["mirror", "gradient"])
def test_solved_exactly_the_predictions_are_the_targets(space, doc):
    """With no more rows than inputs a layer can have any pre-activations."""
    model = nn.Sequential(*layer(), nn.Tanh())
    x, y = batch(0, 4, 5, 4)
    a = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.mse_loss(a.tanh(), y), a)
    make = choose(f"{space} descent on the pre-activations", doc, lr=0.2)
    optimizer = make(model)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    with torch.no_grad():
        if space == "mirror":
            assert_close(model(x), a.tanh() - 0.2 * g, rtol=1e-6, atol=1e-8)
        else:
            assert_close(model[0](x), a - 0.2 * g, rtol=1e-6, atol=1e-8)


def test_least_squares_in_one_step(doc):
    model = layer()
    x, y = batch(0, 30, 5, 4)
    [weight, bias] = after(model, choose("least squares", doc), 1, rows=30, d_out=4, criterion=half_squares)
    solution = torch.linalg.lstsq(joined_inputs(x), y).solution.t()
    assert_close(torch.cat([weight, bias[:, None]], 1), solution, rtol=1e-8, atol=1e-9)


def test_newton_is_iteratively_reweighted_least_squares(doc):
    def criterion(a, y):
        return nn.functional.binary_cross_entropy_with_logits(a, y, reduction="sum")

    model = layer()
    x, labels = batch(0, 30, 5, 4)
    xs, w = joined_inputs(x), torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    expected = []
    for k in range(4):  # each unit is a logistic regression of its own
        p = torch.sigmoid(xs @ w[k])
        r = p * (1 - p)
        working = xs @ w[k] + (labels[:, k] - p) / r
        expected.append(torch.linalg.solve(xs.t() @ (r[:, None] * xs), xs.t() @ (r * working)))
    make = choose("Newton's method for a GLM, IRLS", doc)
    [weight, bias] = after(model, make, 1, rows=30, d_out=4, criterion=criterion)
    assert_close(torch.cat([weight, bias[:, None]], 1), torch.stack(expected), rtol=1e-8, atol=1e-9)


# --- the tables of legal combinations ---------------------------------------------------------------------------------

SOLVERS = {row[0].strip("`"): row[1:] for row in table("solver")}
LOSSES = {"squared": SquaredLoss(), "matching": MatchingLoss(), "post-activation": PostActivationLoss()}
QUADRATIC = [None, SquaredDistance(0.1), WeightDecay(0.1), SquaredDistance(0.1) + WeightDecay(0.1)]
REGULARIZERS = [*QUADRATIC, RelativeEntropy(0.1), RelativeEntropy(0.1) + WeightDecay(0.1)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_table_says_what_is_refused(solver):
    losses, regularizers, *_ = SOLVERS[solver]
    for (name, loss), regularizer in itertools.product(LOSSES.items(), REGULARIZERS):
        named = re.search(rf"`{type(regularizer).__name__}`", regularizers) is not None
        takes = {"any": True, "none": regularizer is None, "quadratic": any(regularizer is q for q in QUADRATIC)}.get(
            regularizers, named
        )
        options = {"loss": loss, "target": GradientTarget(), "regularizer": regularizer}
        make = eval(solver, vars(torchloco))
        if takes and (losses == "any" or name in losses.split(", ")):
            LocoProp(layer(), solver=make, **options).close()
        else:
            with pytest.raises(ValueError, match=type(make).__name__):
                LocoProp(layer(), solver=make, **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1000, 50, 40), (20, 70, 30), (64, 64, 64)])
def test_the_table_says_what_it_costs(solver, n, d_in, d_out):
    formula = SOLVERS[solver][-1].strip("`")
    by_rows, by_gram = re.findall(r"`([^`]*d_out[^`]*)`", ALGORITHMS[ALGORITHMS.index("g(k) are k") :])[:2]
    names = {"N": n, "d_in": d_in, "d_out": d_out, "T": 10}
    for quadratic in (True, False):
        if not quadratic and SOLVERS[solver][0] == "squared":
            continue
        form = by_gram if quadratic else by_rows
        names["g"] = lambda k, form=form: eval(form, {**names, "k": k})
        cost = eval(solver, vars(torchloco)).multiply_adds(Size(n, d_in, d_out, quadratic), 10)
        assert cost == eval(formula, names)


UNKNOWN = Transfer("unknown", torch.tanh)  # neither F nor f′


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_table_says_what_is_needed_of_f(solver):
    losses, _, needs, *_ = SOLVERS[solver]
    model = layer()
    loss = "squared" if losses == "squared" else "matching"
    regularizer = SquaredDistance(1e3) if solver == "ProximalStep()" else None
    make = eval(solver, vars(torchloco))
    optimizer = LocoProp(model, loss=loss, solver=make, transfers={"0": UNKNOWN}, regularizer=regularizer)
    assert ("f′" in needs) == (solver.startswith("Newton"))
    step(model, optimizer, d_out=4)  # autograd gives what is not known


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_a_loss_needs_of_f(name):
    [needs] = [row[3] for row in table("loss") if row[0].strip("`") == repr(LOSSES[name])]

    def take_a_step(safe):
        model = layer()
        target = GradientTarget() if name != "matching" else None
        step(model, LocoProp(model, loss=LOSSES[name], target=target, transfers={"0": UNKNOWN}, safe=safe), d_out=4)

    take_a_step(safe=False)
    if "F for its value" in needs:
        with pytest.raises(ValueError, match="integral of transfer 'unknown' is not known"):
            take_a_step(safe=True)
    else:
        take_a_step(safe=True)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_becomes_of_other_transfers(name):
    [fate] = [row[4] for row in table("loss") if row[0].strip("`") == repr(LOSSES[name])]
    [row] = LocoProp(layer(), loss=LOSSES[name], target=MirrorTarget(), transfers={"0": "gelu"}).layers
    assert row.loss.name == ("squared" if "takes the squared loss" in fate else name)
