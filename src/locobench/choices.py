"""Names that the command line and the code share. Imports nothing heavy, so that `--help` stays quick."""

from typing import Literal, get_args

DataName = Literal["curves", "mnist", "fashion-mnist", "usps"]
ModelName = Literal["standard", "deep", "wide", "wide4"]
Activation = Literal["tanh", "relu"]

DATA_NAMES: tuple[str, ...] = get_args(DataName)
MODEL_NAMES: tuple[str, ...] = get_args(ModelName)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
FigureName = Literal["local-losses"]
