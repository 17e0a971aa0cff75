"""Small models of the kinds people train, with their data: an MLP, a CNN, a vision transformer, a character GPT."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from locobench import data


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) → the same."""
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, length, width))
        return x + self.mlp_out(F.relu(self.mlp_in(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4 × 4 pixels, mean of the tokens."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(49, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 28, 28) → (B, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """Learned positions, head of its own."""

    def __init__(self, characters: int, context: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) → (B, L, characters)."""
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))


def cnn() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@dataclass
class Problem:
    """A model with its data.

    Attributes:
        model: Freshly initialised.
        train: Inputs and classes.
        test: The same, held out.
        batch_size: Inputs per step.
        steps: Of the whole training.
    """

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    steps: int

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled epochs, for ever."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        while True:
            order = torch.randperm(len(x), generator=generator)
            for part in order.split(self.batch_size):
                if len(part) == self.batch_size:
                    yield x[part], y[part]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        logits = self.model(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    @torch.no_grad()
    def evaluate(self, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Mean cross-entropy and accuracy."""
        total = right = count = 0.0
        for x, y in zip(part[0].split(500), part[1].split(500), strict=True):
            logits = self.model(x)
            total += float(F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum"))
            right += float((logits.argmax(-1) == y).sum())
            count += y.numel()
        return total / count, right / count


def mlp() -> nn.Module:
    """Three hidden layers of 512 units."""
    widths = [784, 512, 512, 512]
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(512, 10))


def images(model: nn.Module, count: int = 10_000, batch_size: int = 128, epochs: int = 3) -> Problem:
    """The first training images of Fashion-MNIST; all test images."""
    path = data.users_file("fashion-mnist")
    if path is None:
        raise SystemExit("set LOCOBENCH_DATA to the folder of fashion_mnist.npz")
    pixels = data.load("fashion-mnist")  # verifies the file
    with np.load(path) as arrays:
        parts = [
            (x.view(-1, 1, *pixels.shape), torch.tensor(arrays[name]).long())
            for x, name in ((pixels.train, "y_train"), (pixels.test, "y_test"))
        ]
    train = (parts[0][0][:count], parts[0][1][:count])
    return Problem(model, train, parts[1], batch_size, steps=epochs * (count // batch_size))


def text() -> Problem:
    """The help texts of Python in windows of 64 characters, 300 steps of 32 windows; the last tenth is held out."""
    whole = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(whole))
    codes = {c: i for i, c in enumerate(alphabet)}
    ids = torch.tensor([codes[c] for c in whole])
    windows = ids[: (len(ids) - 1) // 64 * 64].view(-1, 64), ids[1 : 1 + (len(ids) - 1) // 64 * 64].view(-1, 64)
    cut = len(windows[0]) * 9 // 10
    train, test = (windows[0][:cut], windows[1][:cut]), (windows[0][cut:], windows[1][cut:])
    return Problem(GPT(len(alphabet)), train, test, batch_size=32, steps=300)


def build(name: str, seed: int) -> Problem:
    """One of mlp, cnn, vit, gpt."""
    torch.manual_seed(seed)
    makers: dict[str, Callable[[], Problem]] = {
        "mlp": lambda: images(mlp(), 20_000, 500, 5),
        "cnn": lambda: images(cnn()),
        "vit": lambda: images(ViT()),
        "gpt": text,
    }
    return makers[name]()
