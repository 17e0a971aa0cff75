"""torchloco: LocoProp for PyTorch. Several cheap local steps per layer for each back-propagation."""

from torchloco import recipes
from torchloco.display import LayerInfo
from torchloco.exact import ConjugateGradient, Exact
from torchloco.losses import Loss, MatchingLoss, PostActivationLoss, SquaredLoss
from torchloco.optimizer import LocoProp
from torchloco.regularizers import Regularizer, RelativeEntropy, SquaredDistance, WeightDecay
from torchloco.rmsprop import RMSProp
from torchloco.solvers import FirstOrderSteps, ProximalStep, Solver
from torchloco.targets import GradientTarget, LayerRows, MirrorTarget, Target
from torchloco.transfers import Transfer, get_transfer, register_transfer, transfer_names

__version__ = "0.1.0"

__all__ = [
    "ConjugateGradient",
    "Exact",
    "FirstOrderSteps",
    "GradientTarget",
    "LayerInfo",
    "LayerRows",
    "LocoProp",
    "Loss",
    "MatchingLoss",
    "MirrorTarget",
    "PostActivationLoss",
    "ProximalStep",
    "RMSProp",
    "Regularizer",
    "RelativeEntropy",
    "Solver",
    "SquaredDistance",
    "SquaredLoss",
    "Target",
    "Transfer",
    "get_transfer",
    "register_transfer",
    "WeightDecay",
    "recipes",
    "transfer_names",
]
