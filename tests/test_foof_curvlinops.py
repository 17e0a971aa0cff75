"""`recipes.foof` against curvlinops' forward-only K-FAC (FOOF) of the same batch.

curvlinops requires torchvision by way of a package that none of this needs, so it is in no extra. To run these tests::

    pip install --no-deps --constraint constraints.txt \
        curvlinops-for-pytorch einconv einops linear_operator opt_einsum scipy tqdm
"""

import pytest
import torch

from torchloco import recipes

curvlinops = pytest.importorskip("curvlinops")

LR, DAMPING = 0.7, 0.2


@pytest.fixture(params=[(12, True), (12, False), (4, True), (4, False)], ids=lambda p: f"{p[0]} rows, bias {p[1]}")
def case(request, mlp, batches, values):
    """The model, its gradients and curvlinops' operator at the old parameters, and what foof changed in them.

    With 4 rows, fewer than columns, foof works with the rows' N × N form.
    """
    rows, bias = request.param
    model = mlp(6, 5, 3, bias=bias)
    data = batches(1, rows=rows)
    # Without weights and biases as one, curvlinops would precondition them separately.
    kfac = curvlinops.KFACLinearOperator(
        model,
        torch.nn.MSELoss(),
        list(model.parameters()),
        data,
        fisher_type="forward-only",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    kfac.compute_kronecker_factors()
    before = values(model)
    optimizer = recipes.foof(model, LR, DAMPING, output="identity")
    ((x, y),) = data
    torch.nn.functional.mse_loss(model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return kfac, grads, changes, rows


def joined(tensors, layer):
    """Weight and bias as one matrix, the bias as its last column."""
    columns = [tensors[f"{layer}.weight"]]
    if f"{layer}.bias" in tensors:
        columns.append(tensors[f"{layer}.bias"][:, None])
    return torch.cat(columns, 1)


def test_input_factor(case):
    """W - lr · ∂L/∂W · (N · factor + λI)⁻¹: curvlinops' factor is XᵀX / N, torchloco's C is the sum over the rows."""
    kfac, grads, changes, rows = case
    factors = kfac.state_dict()["input_covariances"]
    assert list(factors) == ["0", "2"]
    for layer, factor in factors.items():
        damped = rows * factor + DAMPING * torch.eye(len(factor), dtype=factor.dtype)
        expected = -LR * torch.linalg.solve(damped, joined(grads, layer).t()).t()
        torch.testing.assert_close(joined(changes, layer), expected, rtol=1e-9, atol=1e-12)


def test_inverse_operator(case):
    """curvlinops' own inverse, applied to the gradient.

    (C + λI)⁻¹ = (factor + λ/N · I)⁻¹ / N; its gradient factors are identities, which get no damping.
    """
    kfac, grads, changes, rows = case
    inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=(DAMPING / rows, 0.0))
    expected = [-LR / rows * direction for direction in inverse @ list(grads.values())]
    torch.testing.assert_close(list(changes.values()), expected, rtol=1e-9, atol=1e-12)
