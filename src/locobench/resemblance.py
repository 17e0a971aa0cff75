"""How far LocoProp's update of one mini-batch turns from the gradient towards second-order directions."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from locobench import problems
from locobench.errors import BenchError
from locobench.runfile import write_atomically
from locobench.settings import machine, versions
from locobench.stepping import close, take_step
from torchloco import FirstOrderSteps, LocoProp, recipes
from torchloco.conjugate import conjugate_gradient

STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
DIRECTIONS = {"foof": "FOOF", "kfac": "K-FAC", "gauss-newton": "Gauss-Newton"}
_FISHER_SAMPLES = 10
_CG_ITERATIONS, _CG_TOLERANCE = 300, 1e-3
_LINES = {"solid": "-", "dashed": "--", "dotted": ":"}  # by damping
# By loss and local optimizer: label, colour, marker. "carried" is the state that training left.
_SERIES = {
    "squared plain": ("LocoProp-S, plain steps", "#0072B2", "o"),
    "matching plain": ("LocoProp-M, plain steps", "#D55E00", "s"),
    "squared rmsprop": ("LocoProp-S, RMSProp", "#56B4E9", "o"),
    "matching rmsprop": ("LocoProp-M, RMSProp", "#E69F00", "s"),
    "matching carried": ("LocoProp-M, RMSProp with the state of training", "#009E73", "D"),
}


@dataclass
class Layer:
    """A layer on the mini-batch, and what the second-order directions need of it. A bias is the weight's last column.

    Args:
        name: In the model.
        x: Its rows with a column of ones, (N, d_in + 1).
        a: Its pre-activations, (N, d_out).
        rest: The modules that follow it, up to the logits: linear layers and elementwise activations.
        gradient: ∂L/∂W, (d_out, d_in + 1).
        fisher: B, the mean over examples of gᵀg with g the gradient of an example's loss at `a`, for labels drawn from
            the model's own distribution, (d_out, d_out).
        curvature: Mean diagonal entry of the layer's Gauss-Newton block, from the same labels.
    """

    name: str
    x: Tensor
    a: Tensor
    rest: list[nn.Module]
    gradient: Tensor
    fisher: Tensor
    curvature: float

    def __post_init__(self) -> None:
        # C = XᵀX and B by their eigenvalues, which rounding may have left a little below zero
        c, right = torch.linalg.eigh(self.x.t() @ self.x)
        b, left = torch.linalg.eigh(self.fisher)
        self.c: Tensor = c.clamp(min=0)
        self.b: Tensor = b.clamp(min=0)
        self._right: Tensor = right
        self._left: Tensor = left

    @torch.no_grad()
    def directions(self, damping: float) -> tuple[dict[str, Tensor], float]:
        """The second-order directions, each (d_out, d_in + 1), and the residual of the Gauss-Newton system.

        With g = ∂L/∂W and m the mean diagonal entry of whatever is damped: FOOF g (C + λmI)⁻¹; K-FAC
        (B + λmI)⁻¹ g (C + λmI)⁻¹; Gauss-Newton the d with (block + λmI) d = g.

        Args:
            damping: λ.
        """
        over_c = 1 / (self.c + damping * self.c.mean())
        over_b = 1 / (self.b + damping * self.b.mean())[:, None]
        rotated = self._rotate(self.gradient)
        gauss_newton, residual = self._gauss_newton(damping * self.curvature)
        return {
            "foof": self._rotate_back(rotated * over_c),
            "kfac": self._rotate_back(rotated * over_c * over_b),
            "gauss-newton": gauss_newton,
        }, residual

    @torch.no_grad()
    def gauss_newton_product(self) -> Callable[[Tensor], Tensor]:
        """The product of the layer's Gauss-Newton block with a change of its weight, (d_out, d_in + 1)."""
        logits = self.a
        maps: list[tuple[bool, Tensor]] = []  # their Jacobian: weights, and derivatives of activations
        for module in self.rest:
            if isinstance(module, nn.Linear):
                maps.append((True, module.weight.detach()))
                logits = module(logits)
            else:
                logits, pull_back = torch.func.vjp(module, logits)  # type: ignore[misc]
                (derivative,) = pull_back(torch.ones_like(logits))
                maps.append((False, derivative))
        probabilities = logits.sigmoid()
        output_curvature = probabilities * (1 - probabilities) / len(self.x)

        def product(change: Tensor) -> Tensor:
            tangent = self.x @ change.t()
            for linear, factor in maps:
                tangent = tangent @ factor.t() if linear else tangent * factor
            tangent = tangent * output_curvature
            for linear, factor in reversed(maps):
                tangent = tangent @ factor if linear else tangent * factor
            return tangent.t() @ self.x

        return product

    def _gauss_newton(self, damping: float) -> tuple[Tensor, float]:
        # In coordinates in which the Kronecker product B ⊗ C / N, damped, is the identity: few iterations are enough.
        scale = (torch.outer(self.b, self.c) / len(self.x) + damping).rsqrt_()
        product = self.gauss_newton_product()

        def image(change: Tensor) -> Tensor:
            change = self._rotate_back(scale * change)
            return scale * self._rotate(product(change) + damping * change)

        right = scale * self._rotate(self.gradient)
        solution = conjugate_gradient(image, right, _CG_ITERATIONS, _CG_TOLERANCE, per_unit=False)
        residual = float((image(solution) - right).norm() / right.norm())
        return self._rotate_back(scale * solution), residual

    def _rotate(self, matrix: Tensor) -> Tensor:
        return self._left.t() @ matrix @ self._right

    def _rotate_back(self, matrix: Tensor) -> Tensor:
        return self._left @ matrix @ self._right.t()


def layers(model: problems.Autoencoder, batch: Tensor, seed: int = 0, samples: int = _FISHER_SAMPLES) -> list[Layer]:
    """The model's layers on a mini-batch, in their order.

    Args:
        model: The autoencoder, which is left as it is.
        batch: Images, (N, pixels), of the model's dtype.
        seed: Of the labels that are drawn for the Fisher.
        samples: Labels per image.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = [*model.encoder, *model.decoder]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rows, pre, rests = [], [], []
    out = batch
    for number, module in enumerate(modules):
        if isinstance(module, nn.Linear):
            rows.append(torch.cat([out.detach(), out.new_ones(len(out), 1)], 1))
        out = module(out)
        if isinstance(module, nn.Linear):
            pre.append(out)
            rests.append(modules[number + 1 :])
    gradients = torch.autograd.grad(problems.loss(out, batch), pre, retain_graph=True)
    probabilities = out.detach().sigmoid()
    fishers = [a.new_zeros(a.shape[1], a.shape[1]) for a in pre]
    curvatures = [0.0] * len(pre)
    for sample in range(samples):
        errors = probabilities - torch.bernoulli(probabilities, generator=generator)
        drawn = torch.autograd.grad(out, pre, errors, retain_graph=sample < samples - 1)
        for i, (g, x) in enumerate(zip(drawn, rows, strict=True)):
            fishers[i].addmm_(g.t(), g, alpha=1 / (len(g) * samples))
            squares = g.square().sum(1) @ x.square().sum(1)
            curvatures[i] += float(squares) / (len(g) * samples * g.shape[1] * x.shape[1])
    with torch.no_grad():
        return [
            Layer(name, x, a.detach(), rest, g.t() @ x, fisher, curvature)
            for name, x, a, rest, g, fisher, curvature in zip(
                names, rows, pre, rests, gradients, fishers, curvatures, strict=True
            )
        ]


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
    for series, (label, *_) in _SERIES.items():
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
    if not 1 <= len(dampings) <= len(_LINES) or not all(0 < damping < float("inf") for damping in dampings):
        given = ",".join(f"{damping:g}" for damping in dampings)
        raise BenchError(f"--damping must be one to {len(_LINES)} positive numbers, got {given}")
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
        "fisher": f"of the model's own distribution, {_FISHER_SAMPLES} sampled labels per image",
        "steps": list(STEPS),
        "versions": versions(),
        "machine": machine("cpu"),
        "points": points,
    }


def save(content: dict[str, Any], path: Path) -> list[Path]:
    """Write the numbers as JSON and draw them, next to each other.

    Args:
        content: What `experiment` returned.
        path: The PNG; the JSON has its name with another suffix.
    """
    numbers = path.with_suffix(".json")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(numbers, lambda file: file.write_text(text, encoding="utf-8"))
    figure = draw(content)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=90))
    return [path, numbers]


def draw(content: dict[str, Any]) -> Figure:
    """A row of panels per point and direction, a column per layer, a line per series and damping."""
    points = content["points"]
    count = len(points[0]["layers"])
    figure = Figure(figsize=(2.0 * count + 0.6, 6.4 * len(points) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(points), 1, squeeze=False)[:, 0]
    for part, point in zip(parts, points, strict=True):
        when = f"after {point['training_steps']} steps" if point["training_steps"] else "at the initial weights"
        part.suptitle(f"{when}, loss of the batch {point['loss']:.1f}", fontweight="bold")
        grid = part.subplots(len(DIRECTIONS), count, sharex=True, sharey=True, squeeze=False)
        for axes_row, (kind, label) in zip(grid, DIRECTIONS.items(), strict=True):
            axes_row[0].set_ylabel(f"cosine to {label}")
            for axes, layer in zip(axes_row, point["layers"], strict=True):
                _panel(axes, layer, kind, content["steps"])
        for axes, layer in zip(grid[0], point["layers"], strict=True):
            d_out, columns = layer["shape"]
            axes.set_title(f"{layer['layer']}\n{columns - 1} → {d_out}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("local steps T")
    handles, labels = parts[-1].axes[0].get_legend_handles_labels()
    named = dict(zip(labels[::-1], handles[::-1], strict=True))  # of each label the first line, which is solid
    dampings = ", ".join(
        f"{style} λ = {damping:g}" for damping, style in zip(content["dampings"], _LINES, strict=False)
    )
    figure.legend(
        [*named.values()][::-1], [*named][::-1], loc="outside lower center", ncols=6, frameon=False, title=dampings
    )
    return figure


def _panel(axes: Axes, layer: dict[str, Any], kind: str, steps: list[int]) -> None:
    for result, line in zip(layer["dampings"], _LINES.values(), strict=False):
        axes.axhline(result["gradient"][kind], color="#999999", linestyle=line, linewidth=1.2, label="gradient")
        for series, by_kind in result["updates"].items():
            label, colour, marker = _SERIES[series]
            axes.plot(
                steps,
                by_kind[kind],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=3,
                linewidth=1.2,
                label=label,
            )
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 50], ["1", "3", "10", "50"])
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.05)
    axes.grid(True, color="#E6E6E6", linewidth=0.7)


def _matrices(model: nn.Module) -> list[Tensor]:
    """Every layer's weight with its bias as the last column."""
    return [
        torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
