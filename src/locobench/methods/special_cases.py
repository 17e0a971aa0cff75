"""Known algorithms as special cases of LocoProp."""

from locobench.methods.method import Method
from torchloco import recipes

SPECIAL_CASES = [
    Method(
        "foof",
        "FOOF",
        lambda model, lr, damping=1.0: recipes.foof(model, lr, damping, output="sigmoid"),
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
        lambda model, lr, momentum=0.9: recipes.sgd_momentum(model, lr, momentum, output="sigmoid"),
        lr=3e-3,
        searched={"curves": 3e-3},
        cost=1.1,
        note="equals momentum; one local step of SGD with momentum 0.9",
    ),
]
