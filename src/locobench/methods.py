"""The optimizers that the benchmark compares. To add one, add an entry to `_TABLE`."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from locobench.choices import MAIN_METHODS
from locobench.earlier import EarlierLocoProp
from locobench.errors import BenchError
from locobench.kfac import KFAC
from locobench.libraries import CURVLINOPS, LOCOPROP, PYTORCH_OPTIMIZER, Library
from locobench.pairs import Pair
from torchloco import ConjugateGradient, FirstOrderSteps, LocoProp, RMSProp, recipes


@dataclass(frozen=True)
class Method:
    """An optimizer with the settings that the benchmark gives it.

    Attributes:
        name: What `--methods` calls it.
        label: What tables and plots call it.
        build: Makes it, from a model and a base learning rate.
        lr: Base learning rate where none was searched for.
        searched: Base learning rates by data set, the best of an equal search (results/curves-search).
        cost: Rough price of a step in steps of Adam; it only steers the estimate of the time left.
        period: Steps after which its work repeats, where they are not all alike; a price is the mean over them.
        library: What it needs besides torch and torchloco.
        note: Its other settings, in words.
    """

    name: str
    label: str
    build: Callable[[nn.Module, float], Optimizer]
    lr: float
    note: str
    searched: dict[str, float] = field(default_factory=dict)
    cost: float = 1.0
    period: int = 1
    library: Library | None = None

    @property
    def missing(self) -> str | None:
        """The command that installs its library, None where nothing is missing."""
        return self.library.install if self.library is not None and self.library.missing else None

    def rate(self, data: str) -> float:
        """The base learning rate on that data set, unless `--lr` gives another."""
        return self.searched.get(data, self.lr)


def _pytorch_optimizer(name: str) -> Callable[..., Optimizer]:
    """A class of that library, which is imported only where it is needed."""
    made: Callable[..., Optimizer] = getattr(PYTORCH_OPTIMIZER.load(), name)
    return made


_TABLE = [
    Method(
        "locoprop-m",
        "LocoProp-M",
        lambda model, lr: LocoProp(model, lr, loss="matching", output="sigmoid"),
        lr=3e-5,
        searched={"curves": 1e-4},
        cost=7.5,
        note="matching loss, activation lr 10, 10 local steps of RMSProp",
    ),
    Method(
        "locoprop-s",
        "LocoProp-S",
        lambda model, lr: LocoProp(model, lr, loss="squared", output="sigmoid"),
        lr=1e-4,
        searched={"curves": 3e-4},
        cost=7.5,
        note="squared loss, activation lr 10, 10 local steps of RMSProp",
    ),
    Method(
        "locoprop-m-fast",
        "LocoProp-M, fast",
        lambda model, lr: recipes.locoprop_m(model, lr, paper=False, output="sigmoid"),
        lr=4e-5,
        searched={"curves": 1e-4},
        cost=2.0,
        note="as locoprop-m, each local step after the first over 48 of the rows",
    ),
    Method(
        "locoprop-s-fast",
        "LocoProp-S, fast",
        lambda model, lr: recipes.locoprop_s(model, lr, paper=False, output="sigmoid"),
        lr=3e-4,
        searched={"curves": 3e-4},
        cost=2.0,
        note="as locoprop-s, each local step after the first over 48 of the rows",
    ),
    Method(
        "locoprop-s-bf16",
        "LocoProp-S, bfloat16",
        lambda model, lr: LocoProp(
            model, lr, loss="squared", solver=FirstOrderSteps(local_dtype=torch.bfloat16), output="sigmoid"
        ),
        lr=1e-4,
        searched={"curves": 3e-4},
        cost=3.0,
        note="as locoprop-s, local products in bfloat16",
    ),
    Method(
        "locoprop-m-adam",
        "LocoProp-M, Adam",
        lambda model, lr: LocoProp(model, lr, solver=FirstOrderSteps(torch.optim.Adam), output="sigmoid"),
        lr=1e-4,
        cost=8.5,
        note="matching loss, activation lr 10, 10 local steps of Adam",
    ),
    Method(
        "locoprop-m-anderson",
        "LocoProp-M, Anderson",
        lambda model, lr: recipes.locoprop_m_anderson(model, lr, output="sigmoid"),
        lr=30.0,
        cost=9.0,
        note="matching loss, 10 gradients with Anderson acceleration of memory 5; the rate is the activation lr",
    ),
    Method(
        "locoprop-s-exact",
        "LocoProp-S, exact",
        lambda model, lr: recipes.locoprop_s_exact(model, lr, output="sigmoid"),
        lr=300.0,
        cost=2.5,
        note="squared loss, solved by Cholesky factors, relative damping 1; the rate is the activation lr",
    ),
    Method(
        "locoprop-s-cg",
        "LocoProp-S, CG",
        lambda model, lr: LocoProp(
            model, activation_lr=lr, loss="squared", solver=ConjugateGradient(10), output="sigmoid"
        ),
        lr=300.0,
        cost=4.5,
        note="squared loss, 10 iterations of conjugate gradients; the rate is the activation lr",
    ),
    Method(
        "foof",
        "FOOF",
        lambda model, lr: recipes.foof(model, lr, damping=1.0, output="sigmoid"),
        lr=30.0,
        cost=2.5,
        note="locoprop-s-exact with absolute damping 1",
    ),
    Method(
        "proxprop",
        "ProxProp",
        lambda model, lr: recipes.proxprop(model, lr, lr=1.0, output="sigmoid"),
        lr=30.0,
        cost=3.0,
        note="proximal step 1, 3 iterations of conjugate gradients; the rate is the explicit step",
    ),
    Method(
        "implicit-sgd",
        "Implicit SGD",
        lambda model, lr: recipes.implicit_sgd(model, lr, output="sigmoid"),
        lr=3e-2,
        cost=2.5,
        note="proximal point of each layer's quadratic",
    ),
    Method(
        "exponentiated-gradient",
        "Exponentiated gradient",
        lambda model, lr: recipes.exponentiated_gradient(model, lr, output="sigmoid"),
        lr=1e-2,
        note="of the weights' magnitudes",
    ),
    Method(
        "backprop",
        "Backprop by LocoProp",
        lambda model, lr: recipes.backprop(model, lr, output="sigmoid"),
        lr=1e-2,
        searched={"curves": 3e-2},
        cost=1.1,
        note="equals sgd; one plain local step",
    ),
    Method(
        "sgd-momentum",
        "Momentum by LocoProp",
        lambda model, lr: recipes.sgd_momentum(model, lr, output="sigmoid"),
        lr=3e-3,
        searched={"curves": 3e-3},
        cost=1.1,
        note="equals momentum; one local step of SGD with momentum 0.9",
    ),
    Method(
        "sgd",
        "SGD",
        lambda model, lr: torch.optim.SGD(model.parameters(), lr),
        lr=1e-2,
        searched={"curves": 3e-2},
        note="no momentum",
    ),
    Method(
        "momentum",
        "Momentum",
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
        lr=3e-3,
        searched={"curves": 3e-3},
        note="momentum 0.9",
    ),
    Method(
        "nesterov",
        "Nesterov",
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True),
        lr=3e-3,
        searched={"curves": 3e-3},
        note="momentum 0.9",
    ),
    Method(
        "adagrad",
        "AdaGrad",
        lambda model, lr: torch.optim.Adagrad(model.parameters(), lr),
        lr=1e-2,
        searched={"curves": 3e-3},
        note="accumulator starts at 0",
    ),
    Method(
        "rmsprop",
        "RMSProp",
        lambda model, lr: torch.optim.RMSprop(model.parameters(), lr, alpha=0.9),
        lr=3e-4,
        searched={"curves": 1e-3},
        note="torch's; decay 0.9, no momentum",
    ),
    Method(
        "rmsprop-tf",
        "RMSProp (TF)",
        lambda model, lr: RMSProp(model.parameters(), lr, decay=0.9, momentum=0.9, epsilon=1e-5),
        lr=3e-4,
        searched={"curves": 1e-3},
        note="TensorFlow's arithmetic; decay 0.9, momentum 0.9, epsilon 1e-5",
    ),
    Method(
        "adam",
        "Adam",
        lambda model, lr: torch.optim.Adam(model.parameters(), lr),
        lr=1e-3,
        searched={"curves": 1e-2},
        note="betas 0.9 and 0.999",
    ),
    Method(
        "muon",
        "Muon",
        lambda model, lr: Pair(model, lambda ps: torch.optim.Muon(ps, lr=lr), torch.optim.AdamW),
        lr=2e-2,
        cost=1.6,
        note="torch's, for the weights; AdamW for the biases",
    ),
    Method(
        "soap",
        "SOAP",
        lambda model, lr: _pytorch_optimizer("SOAP")(model.parameters(), lr=lr, weight_decay=0.0),
        lr=3e-3,
        cost=3.0,
        period=10,
        library=PYTORCH_OPTIMIZER,
        note="pytorch_optimizer's; preconditioners every 10 steps, no weight decay",
    ),
    Method(
        "shampoo",
        "Shampoo",
        lambda model, lr: _pytorch_optimizer("ScalableShampoo")(
            model.parameters(), lr=lr, start_preconditioning_step=5, preconditioning_compute_steps=10
        ),
        lr=1e-3,
        cost=3.0,
        period=10,
        library=PYTORCH_OPTIMIZER,
        note="pytorch_optimizer's ScalableShampoo; starts after 5 steps, preconditioners every 10",
    ),
    Method(
        "kfac",
        "K-FAC",
        lambda model, lr: KFAC(model, lr),
        lr=1e-1,
        cost=2.0,
        period=10,
        library=CURVLINOPS,
        note="factors and inverses by curvlinops, every 10 steps; damping 0.1, clip 0.01, momentum 0.9",
    ),
]

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

# Another implementation of LocoProp, for its price alone: its loop has no place for a schedule.
_EARLIER = Method(
    "locoprop-pypi",
    "LocoProp 0.1.0 of PyPI",
    lambda model, lr: EarlierLocoProp(model),
    lr=2e-5,
    cost=8.0,
    library=LOCOPROP,
    note="10 local steps, else its defaults",
)
PRICED: dict[str, Method] = {**METHODS, _EARLIER.name: _EARLIER}


def find(name: str, among: Mapping[str, Method] = METHODS) -> Method:
    """The method of that name, or an error that lists the known ones and the nearest."""
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name.lower(), among, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    raise BenchError(f"unknown method {name!r}; {hint}: {', '.join(among)}")


def find_all(names: str, among: Mapping[str, Method] = METHODS) -> list[Method]:
    """The methods of a comma-separated list, each once, in its order; `main` and `all` stand for several."""
    several = {"main": list(MAIN_METHODS), "all": list(among)}
    parts = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [name for part in parts for name in several.get(part, [part])]
    if not wanted:
        raise BenchError(f"no method named; there are: {', '.join(among)}")
    return [find(name, among) for name in dict.fromkeys(wanted)]
