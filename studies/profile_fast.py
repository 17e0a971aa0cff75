"""Where the time of a fast LocoProp-M step goes, by torch.profiler: python studies/profile_fast.py > FILE"""

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from locobench import problems
from torchloco import FirstOrderSteps, RMSProp, recipes, sampling

STEPS = 10


def recorded(cls: type, method: str, name: str) -> None:
    """Let a method show up in the profile under a name."""
    plain = getattr(cls, method)

    def named(*args, **kwargs):
        with record_function(name):
            return plain(*args, **kwargs)

    setattr(cls, method, named)


torch.set_flush_denormal(True)
torch.set_num_threads(2)
recorded(sampling.SampledGradients, "gradient", "products")
recorded(RMSProp, "_update", "RMSProp")
recorded(FirstOrderSteps, "solve", "local steps")
batch = torch.rand(1000, 784, generator=torch.Generator().manual_seed(0))
model = problems.build("standard", "tanh", 784, seed=0)
optimizer = recipes.locoprop_m(model, 4e-5, paper=False, output="sigmoid")


def step() -> None:
    """One training step."""
    optimizer.zero_grad()
    with record_function("forward and backward pass"):
        problems.loss(model(batch), batch).backward()
    with record_function("step"):
        optimizer.step()


for _ in range(3):
    step()
with profile(activities=[ProfilerActivity.CPU]) as found:
    for _ in range(STEPS):
        step()
events = {event.key: event for event in found.key_averages()}
print(f"ms per step, mean of {STEPS} steps, 2 threads, torch {torch.__version__}")
for name in ("forward and backward pass", "step", "local steps", "products", "RMSProp"):
    event = events[name]
    print(f"{event.cpu_time_total / 1000 / STEPS:8.1f}  {name} ({event.count // STEPS} calls)")
print()
for event in sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)[:16]:
    if event.key not in events or not event.key.startswith("aten"):
        continue
    print(f"{event.self_cpu_time_total / 1000 / STEPS:8.1f}  {event.key} ({event.count // STEPS} calls)")
