"""How far LocoProp's update of one mini-batch turns from the gradient towards second-order directions."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from locobench import problems
from locobench.curvature import FISHER_SAMPLES, layers
from locobench.errors import BenchError
from locobench.series import SERIES
from locobench.settings import machine, versions
from locobench.stepping import close, take_step
from torchloco import FirstOrderSteps, LocoProp, recipes

STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
MOST_DAMPINGS = 3  # that a plot can tell apart


def displacements(
    model: problems.Autoencoder,
    batch: Tensor,
    series: str,
    steps: int,
    rates: dict[str, float],
    state: dict[str, Any] | None = None,
) -> list[Tensor]:
    """W̃ - W of every layer after one LocoProp update, (d_out, d_in + 1) each, the bias as the last column.

    Args:
        model: The autoencoder, which is left as it is.
        batch: Images, (N, pixels).
        series: Loss and local optimizer, such as "squared plain".
        steps: T.
        rates: The step size of the plain steps, by layer.
        state: Of the optimizer that trained the model, for "carried".
    """
    new = deepcopy(model)
    loss, kind = series.split()
    if kind == "plain":
        optimizer = LocoProp(
            new,
            loss=loss,
            solver=FirstOrderSteps(torch.optim.SGD, schedule="constant"),
            params=[{"params": [name], "lr": rate} for name, rate in rates.items()],
            output="sigmoid",
        )
    else:
        recipe = recipes.locoprop_s if loss == "squared" else recipes.locoprop_m
        optimizer = recipe(new, output="sigmoid")
    if kind == "carried" and state is not None:
        optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["local_steps"] = steps
    take_step(new, optimizer, batch)
    close(optimizer)
    return [after - before for after, before in zip(_matrices(new), _matrices(model), strict=True)]


def measure(
    model: problems.Autoencoder,
    batch: Tensor,
    dampings: Sequence[float],
    steps: Sequence[int] = STEPS,
    state: dict[str, Any] | None = None,
    seed: int = 0,
    on_part: Callable[[str], object] = lambda part: None,
) -> list[dict[str, Any]]:
    """Cosines of LocoProp's update with the second-order directions at one point, per layer, as JSON values.

    Args:
        model: The autoencoder; left as it is.
        batch: Images, (N, pixels), of the model's dtype.
        dampings: λ, each relative to the mean diagonal entry of what is damped.
        steps: T, increasing.
        state: Of the optimizer that trained the model, if there is one.
        seed: Of the Fisher's labels.
        on_part: Told what comes next.
    """
    found = layers(model, batch, seed)
    # Plain steps of 1 / (largest eigenvalue of C) are stable for the matching loss, too, as no f' is above 1 here.
    rates = {layer.name: 1 / float(layer.c[-1]) for layer in found}
    updates: dict[str, list[list[Tensor]]] = {}
    model, batch = deepcopy(model).double(), batch.double()  # float32 would round small changes of weights away
    for series, (label, _) in SERIES.items():
        if state is not None or not series.endswith("carried"):
            on_part(label)
            updates[series] = [displacements(model, batch, series, count, rates, state) for count in steps]
    rows = []
    for number, layer in enumerate(found):
        on_part(f"second-order directions of {layer.name}")
        results = []
        for damping in dampings:
            directions, residual = layer.directions(damping)
            results.append(
                {
                    "damping": damping,
                    "gauss_newton_residual": residual,
                    "gradient": {kind: cosine(layer.gradient, goal) for kind, goal in directions.items()},
                    "foof": {kind: cosine(directions["foof"], goal) for kind, goal in directions.items()},
                    "updates": {
                        series: {
                            kind: [-cosine(update[number], goal) for update in by_steps]
                            for kind, goal in directions.items()
                        }
                        for series, by_steps in updates.items()
                    },
                }
            )
        rows.append(
            {
                "layer": layer.name,
                "shape": list(layer.gradient.shape),
                "largest_eigenvalue_over_mean": float(layer.c[-1] / layer.c.mean()),
                "plain_step": rates[layer.name],
                "to_gradient": {
                    series: [-cosine(update[number], layer.gradient) for update in by_steps]
                    for series, by_steps in updates.items()
                },
                "dampings": results,
            }
        )
    return rows


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors of one shape; 0 if one of them is zero."""
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0


def experiment(
    model: problems.Autoencoder,
    images: Tensor,
    config: dict[str, Any],
    *,
    warm_up: int,
    batch_size: int,
    dampings: Sequence[float],
    seed: int = 0,
    on_part: Callable[[str], object] = lambda part: None,
) -> dict[str, Any]:
    """Measure at the initial weights and, unless `warm_up` is 0, after some training with LocoProp-M.

    Args:
        model: The autoencoder with its initial weights; it is trained in place.
        images: Training images, (count, pixels). One batch is measured on and never trained on.
        config: What else decides the numbers, for the record.
        warm_up: Steps of training between the two points, with the paper's settings at its full rate.
        batch_size: Images per step, and in the measured batch.
        dampings: λ, relative.
        seed: Of the order of the images and the Fisher's labels.
        on_part: Told what comes next.

    Raises:
        BenchError: A value that makes no sense, or too few images.
    """
    if not 1 <= len(dampings) <= MOST_DAMPINGS or not all(0 < damping < float("inf") for damping in dampings):
        given = ",".join(f"{damping:g}" for damping in dampings)
        raise BenchError(f"--damping must be one to {MOST_DAMPINGS} positive numbers, got {given}")
    if len(images) < 2 * batch_size:
        raise BenchError(f"--batch-size {batch_size} needs at least twice as many images, there are {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batch, *chunks = (images[part] for part in torch.split(order, batch_size) if len(part) == batch_size)
    points = []
    state = None
    for trained in dict.fromkeys([0, warm_up]):
        if trained:
            on_part(f"{trained} steps of training")
            optimizer = recipes.locoprop_m(model, output="sigmoid")
            for step in range(trained):
                take_step(model, optimizer, chunks[step % len(chunks)])
            state = optimizer.state_dict()
            optimizer.close()
        rows = measure(model, batch, dampings, STEPS, state, seed, on_part)
        points.append({"training_steps": trained, "loss": problems.mean_loss(model, batch), "layers": rows})
    return {
        **config,
        "warm_up": warm_up,
        "batch_size": batch_size,
        "dampings": list(dampings),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "rmsprop": {"lr": 1e-5, "activation_lr": 10.0, "solver": repr(FirstOrderSteps())},
        "plain": {"lr": "1 / largest eigenvalue of the layer's C", "activation_lr": 10.0, "schedule": "constant"},
        "fisher": f"of the model's own distribution, {FISHER_SAMPLES} sampled labels per image",
        "steps": list(STEPS),
        "versions": versions(),
        "machine": machine("cpu"),
        "points": points,
    }


def _matrices(model: nn.Module) -> list[Tensor]:
    """Every layer's weight with its bias as the last column."""
    return [
        torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
