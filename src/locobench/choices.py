"""Names that the command line and the code share. Imports nothing heavy, so that `--help` stays quick."""

from typing import Literal, get_args

DataName = Literal["curves", "mnist", "fashion-mnist", "usps"]
TierName = Literal["smoke", "short", "paper"]
ModelName = Literal["standard", "deep", "wide", "wide4"]
Activation = Literal["tanh", "relu"]

DATA_NAMES: tuple[str, ...] = get_args(DataName)
MODEL_NAMES: tuple[str, ...] = get_args(ModelName)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
FigureName = Literal["local-losses", "second-order", "speed"]

# The methods that are compared unless others are named, and the others.
MAIN_METHODS = (
    *("locoprop-m-fast", "locoprop-m", "locoprop-s"),
    *("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "rmsprop-tf", "adam", "muon", "kfac"),
)
MORE_METHODS = (
    "adamw",
    "nadam",
    "schedule-free",
    "locoprop-m-centered",
    "locoprop-m-normalized",
    "locoprop-s-fast",
    "locoprop-s-bf16",
    "locoprop-m-adam",
    "locoprop-m-anderson",
    "locoprop-s-exact",
    "locoprop-spectral",
    "locoprop-s-cg",
    "foof",
    "proxprop",
    "implicit-sgd",
    "exponentiated-gradient",
    "backprop",
    "sgd-momentum",
    "soap",
    "shampoo",
    "foof-curvlinops",
)
# Those of the full study, each from a well-kept library; tuned in this order.
STUDY_METHODS = (
    "locoprop-m-centered",
    "locoprop-m-normalized",
    "locoprop-m-fast",
    "adam",
    "rmsprop-tf",
    "locoprop-m",
    "rmsprop",
    "momentum",
    "soap",
    "shampoo",
    "kfac",
    "muon",
    "nesterov",
    "adagrad",
    "sgd",
    "adamw",
    "nadam",
    "schedule-free",
    "locoprop-s",
    "locoprop-spectral",
    "locoprop-s-exact",
    "foof-curvlinops",
)
SPEED_ONLY = ("locoprop-pypi",)
