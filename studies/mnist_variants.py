"""Variants of the local steps on MNIST: rows, number of steps, rates. Prints the train loss after some epochs, and the
test loss after the last.

    LOCOBENCH_DATA=... python studies/mnist_variants.py EPOCHS OF lr=4e-5,local_rows=48 lr=4e-5,local_rows=64

trains each variant for EPOCHS epochs of a schedule of OF epochs, one seed, one thread. gamma=0.02 makes the targets
normalized, at a distance that goes with the lr's factor to the power of follow, 1 unless given (0 keeps it constant),
and to one power more where that has decayed below bend. once=1 takes MomentumSteps, whose metric is renewed once per
mini-batch.
"""

import sys
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

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

    def __init__(self, power: float, bend: float) -> None:
        super().__init__()
        self.power, self.bend = power, bend
        self.seen = [0.0]  # the highest factor; the copy that the optimizer makes shares it

    def scale(self, rows: LayerRows) -> float:
        """γ / rms(G), times that power."""
        factor = rows.lr_factor
        self.seen[0] = max(self.seen[0], factor)
        decayed = factor / self.bend if self.seen[0] == 1 and factor < self.bend else 1.0
        return float(decayed * factor**self.power) * super().scale(rows)


def run(variant: str, epochs: int, of: int, seed: int = 0) -> None:
    """Train one variant."""
    options: dict[str, Any] = {key: float(value) for key, value in (part.split("=") for part in variant.split(","))}
    lr, steps = options.pop("lr"), int(options.pop("steps", 10))
    if "local_rows" in options:
        options["local_rows"] = int(options["local_rows"])
    target: dict[str, Any] = {}
    if "gamma" in options:
        following = Following(options.pop("follow", 1.0), options.pop("bend", 0.0))
        target = {"activation_lr": options.pop("gamma"), "target": following}
    solver = (MomentumSteps if options.pop("once", 0) else FirstOrderSteps)(**options)
    model = problems.build("standard", "tanh", 784, seed)
    optimizer = LocoProp(model, lr, local_steps=steps, output="sigmoid", solver=solver, **target)
    scheduler = LambdaLR(optimizer, lambda step: linear_decay(step, of * 60))
    print(variant, end="", flush=True)
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        for part in torch.randperm(len(images), generator=generator).split(1000):
            optimizer.zero_grad()
            problems.loss(model(images[part]), images[part]).backward()
            optimizer.step()
            scheduler.step()
        if epoch in SHOWN:
            with torch.no_grad():
                print(f"  {epoch}: {problems.mean_loss(model, images):.2f}", end="", flush=True)
    with torch.no_grad():
        print(f"  test: {problems.mean_loss(model, mnist.test):.2f}")


for spec in sys.argv[3:]:
    run(spec, int(sys.argv[1]), int(sys.argv[2]))
