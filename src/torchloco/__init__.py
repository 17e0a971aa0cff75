"""torchloco: LocoProp for PyTorch. Several cheap local steps per layer for each back-propagation."""

from torchloco import recipes
from torchloco.anderson import Anderson
from torchloco.display import LayerInfo
from torchloco.exact import ConjugateGradient, Exact
from torchloco.inputs import Dense, Inputs
from torchloco.layers import Layer, register_layer
from torchloco.losses import Loss, MatchingLoss, PostActivationLoss, SquaredLoss
from torchloco.momentum import MomentumSteps
from torchloco.newton import Newton
from torchloco.optimizer import LocoProp
from torchloco.outer import Bounded, OuterOptimizer, OuterRule
from torchloco.problem import LocalProblem, Size
from torchloco.registry import register_transfer
from torchloco.regularizers import Regularizer, RelativeEntropy, SquaredDistance, WeightDecay
from torchloco.rmsprop import RMSProp
from torchloco.solvers import ProximalStep, Solver, Task
from torchloco.spectral import Spectral
from torchloco.steps import FirstOrderSteps
from torchloco.targets import (
    GradientTarget,
    LayerRows,
    MirrorTarget,
    ModifiedTarget,
    MomentumTarget,
    NormalizedTarget,
    Target,
)
from torchloco.transfers import Transfer, get_transfer, transfer_names

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "Bounded",
    "ConjugateGradient",
    "Dense",
    "Exact",
    "FirstOrderSteps",
    "GradientTarget",
    "Inputs",
    "Layer",
    "LayerInfo",
    "LayerRows",
    "LocalProblem",
    "LocoProp",
    "Loss",
    "MatchingLoss",
    "MirrorTarget",
    "ModifiedTarget",
    "MomentumSteps",
    "MomentumTarget",
    "Newton",
    "NormalizedTarget",
    "OuterOptimizer",
    "OuterRule",
    "PostActivationLoss",
    "ProximalStep",
    "RMSProp",
    "Regularizer",
    "RelativeEntropy",
    "Size",
    "Solver",
    "Spectral",
    "SquaredDistance",
    "SquaredLoss",
    "Target",
    "Task",
    "Transfer",
    "WeightDecay",
    "get_transfer",
    "recipes",
    "register_layer",
    "register_transfer",
    "transfer_names",
]
