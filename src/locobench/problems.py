"""The deep autoencoder of the benchmark, its initial weights and its loss."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from locobench.choices import ACTIVATIONS, MODEL_NAMES
from locobench.errors import BenchError

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}

# Widths of the encoder after the pixels, the middle part once or several times; the last one is the code. The decoder
# mirrors them.
_ENCODER = ([1000], [500], [250, 30])
# By what the hidden widths are multiplied, and how many layers of 500 there are.
_VARIANTS: dict[str, tuple[int, int]] = {"standard": (1, 1), "deep": (1, 3), "wide": (2, 1), "wide4": (4, 1)}


class Autoencoder(nn.Module):
    """Linear layers with an activation between them; the code is linear and so is the output (logits).

    Args:
        pixels: Width of the input and of the output.
        encoder: Widths of the encoder's layers; the decoder has them in the opposite order.
        activation: `tanh` or `relu`.
    """

    def __init__(self, pixels: int, encoder: list[int], activation: str) -> None:
        super().__init__()
        widths = [pixels, *encoder]
        self.encoder = _stack(widths, activation)
        self.decoder = _stack(widths[::-1], activation)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the reconstructed pixels, same shape as `images`."""
        logits: Tensor = self.decoder(self.encoder(images))
        return logits


def build(model: str, activation: str, pixels: int, seed: int, *, width: int = 1, depth: int = 1) -> Autoencoder:
    """The autoencoder with its initial weights, which depend on the seed and on nothing else.

    Args:
        model: `standard` (784-1000-500-250-30-… for 784 pixels), `deep` (the 500 layers three times),
            `wide` or `wide4` (all hidden widths and the code times 2 or 4).
        activation: `tanh` or `relu`.
        pixels: Width of the data.
        seed: Of the initial weights.
        width: Multiplies all hidden widths and the code.
        depth: Multiplies the number of 500 layers.
    """
    if model not in _VARIANTS:
        raise BenchError(f"unknown model {model!r}; there are: {', '.join(MODEL_NAMES)}")
    if activation not in _ACTIVATIONS:
        raise BenchError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    width, depth = width * _VARIANTS[model][0], depth * _VARIANTS[model][1]
    before, middle, after = _ENCODER
    encoder = [width * units for units in before + depth * middle + after]
    autoencoder = Autoencoder(pixels, encoder, activation)
    generator = torch.Generator().manual_seed(seed)
    for module in autoencoder.modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            _uniform(module.weight, sqrt(6 / (fan_in + fan_out)), generator)
            # The benchmark's authors draw biases as well, as if from fan_out inputs.
            _uniform(module.bias, sqrt(6 / (2 * fan_out)), generator)
    return autoencoder


def loss(logits: Tensor, images: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the pixels and averaged over the images."""
    return functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


@torch.no_grad()
def mean_loss(model: nn.Module, images: Tensor, chunk: int = 5000) -> float:
    """The loss over all of `images`, in chunks that fit into memory, summed in double precision."""
    total = 0.0
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        pixel_losses = functional.binary_cross_entropy_with_logits(model(part), part, reduction="none")
        total += pixel_losses.sum(dim=1).cpu().double().sum().item()
    return total / len(images)


def _stack(widths: list[int], activation: str) -> nn.Sequential:
    """Linear layers of the given widths, with an activation between each two, and none after the last."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    nn.init.uniform_(parameter, -bound, bound, generator=generator)
