"""Variants of the local steps on MNIST: rows, number of steps, rates. Prints the train loss after some epochs, and the
test loss after the last.

    LOCOBENCH_DATA=... python studies/mnist_variants.py EPOCHS OF lr=4e-5,local_rows=48 lr=4e-5,local_rows=64

trains each variant for EPOCHS epochs of a schedule of OF epochs, one seed, one thread. gamma=0.02 makes the targets
normalized, at a distance that goes with the lr's factor to the power of follow, 1 unless given (0 keeps it constant),
and to one power more where that has decayed below bend. once=1 takes MomentumSteps, whose metric is renewed once per
mini-batch. What follows @N: holds after epoch N, as in gamma=0.012,once=1,momentum=0.998,lr=3e-5@40:momentum=0.999.
"""

import sys
from typing import Any

import torch
from torch import nn

from locobench import data, problems
from locobench.schedules import linear_decay
from torchloco import FirstOrderSteps, LayerRows, LocoProp, MomentumSteps, NormalizedTarget

SHOWN = (3, 5, 10, 15, 20, *range(30, 101, 10))
torch.set_flush_denormal(True)
torch.set_num_threads(1)
mnist = data.load("mnist")
images = mnist.train


class Following(NormalizedTarget):
    """Normalized targets whose distance goes with a power of the factor of lr, one higher once that is below a bend."""

    def __init__(self, schedule: list[float], power: float, bend: float) -> None:
        super().__init__()
        self.schedule = schedule  # the copy that the optimizer makes shares it
        self.power, self.bend = power, bend

    def scale(self, rows: LayerRows) -> float:
        """γ / rms(G), times that power."""
        factor, highest = self.schedule
        decayed = factor / self.bend if highest == 1 and factor < self.bend else 1.0
        return float(decayed * factor**self.power) * super().scale(rows)


def parse(text: str) -> dict[str, Any]:
    """The numbers of name=number, comma-separated."""
    return {key: float(value) for key, value in (part.split("=") for part in text.split(","))}


def build(model: nn.Module, given: dict[str, Any], schedule: list[float]) -> LocoProp:
    """The optimizer of these options."""
    options = dict(given)
    lr, steps = options.pop("lr"), int(options.pop("steps", 10))
    if "local_rows" in options:
        options["local_rows"] = int(options["local_rows"])
    target: dict[str, Any] = {}
    if "gamma" in options:
        following = Following(schedule, options.pop("follow", 1.0), options.pop("bend", 0.0))
        target = {"activation_lr": options.pop("gamma"), "target": following}
    solver = (MomentumSteps if options.pop("once", 0) else FirstOrderSteps)(**options)
    return LocoProp(model, lr, local_steps=steps, output="sigmoid", solver=solver, **target)


def run(variant: str, epochs: int, of: int, seed: int = 0) -> None:
    """Train one variant."""
    first, *later = variant.split("@")
    changes = {int(epoch): parse(text) for epoch, text in (change.split(":") for change in later)}
    options = parse(first)
    model = problems.build("standard", "tanh", 784, seed)
    schedule = [1.0, 0.0]  # the factor of lr, and its highest so far
    optimizer = build(model, options, schedule)
    print(variant, end="", flush=True)
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        for number, part in enumerate(torch.randperm(len(images), generator=generator).split(1000)):
            schedule[0] = linear_decay(60 * (epoch - 1) + number, 60 * of)
            schedule[1] = max(schedule)
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * schedule[0]
            optimizer.zero_grad()
            problems.loss(model(images[part]), images[part]).backward()
            optimizer.step()
        if epoch in SHOWN:
            with torch.no_grad():
                print(f"  {epoch}: {problems.mean_loss(model, images):.2f}", end="", flush=True)
        if epoch in changes:
            options |= changes[epoch]
            state = optimizer.state_dict()
            optimizer.close()
            optimizer = build(model, options, schedule)
            optimizer.load_state_dict(state)
    with torch.no_grad():
        print(f"  test: {problems.mean_loss(model, mnist.test):.2f}")


for spec in sys.argv[3:]:
    run(spec, int(sys.argv[1]), int(sys.argv[2]))
