"""Small models of many kinds, each with a batch and the loss of one pass. All train with AdamW out of the box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Problem:
    """A model and its loss.

    Args:
        model: The model, in training mode.
        loss: Takes the model, returns the loss of a fixed batch.
        output: What `output=` takes.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    output: Any = None


ZOO: dict[str, Callable[[], Problem]] = {}


def entry(make: Callable[[], Problem]) -> Callable[[], Problem]:
    """Add a builder to the zoo."""
    ZOO[make.__name__.replace("_", " ")] = make
    return make


def classify(model: nn.Module, x: Tensor, classes: int = 4) -> Problem:
    """Cross-entropy on labels that a linear map of the input decides."""
    flat = x.flatten(1).to(torch.get_default_dtype())
    y = (flat @ torch.randn(flat.shape[1], classes)).argmax(1)
    return Problem(model, lambda m: F.cross_entropy(m(x), y), nn.CrossEntropyLoss())


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@entry
def mlp() -> Problem:
    return classify(
        nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), randn(32, 10)
    )


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


@entry
def deep_autoencoder() -> Problem:
    sizes = (20, 16, 8, 4, 8, 16, 20)
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    x = torch.rand(32, 20)
    loss = lambda m: F.binary_cross_entropy_with_logits(m(x), x, reduction="sum") / 32  # noqa: E731
    return Problem(nn.Sequential(*layers), loss, nn.BCEWithLogitsLoss())


@entry
def mlp_with_norms_dropout_and_residuals() -> Problem:
    model = nn.Sequential(
        *(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.1)),
        Residual(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(0.1)),
        *(nn.Linear(16, 16), nn.SiLU(inplace=True), nn.Linear(16, 4)),
    )
    return classify(model, randn(32, 10))


@entry
def resnet() -> Problem:
    def block() -> nn.Module:
        return Residual(
            *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        )

    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), block(), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 6, 3, stride=2), block(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    return classify(model, randn(16, 1, 8, 8))


@entry
def depthwise_separable_cnn() -> Problem:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 12, 1), nn.ReLU6()),
        *(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 4)),
    )
    return classify(model, randn(16, 3, 8, 8))


@entry
def transposed_convolutions() -> Problem:
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 8), nn.Tanh()),
        *(nn.Linear(8, 96), nn.ReLU(), nn.Unflatten(1, (6, 4, 4)), nn.ConvTranspose2d(6, 1, 4, stride=2, padding=1)),
    )
    x = torch.rand(16, 1, 8, 8)
    return Problem(model, lambda m: F.mse_loss(m(x), x))


@entry
def unet() -> Problem:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.mid = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
            self.time = nn.Linear(1, 8)
            self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 1)
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            skip = F.relu(self.down(x))
            h = F.silu(
                self.norm(self.mid(F.max_pool2d(skip, 2)) + self.time(x.mean((1, 2, 3))[:, None])[..., None, None])
            )
            return self.out(torch.cat([skip, self.up(h)], 1))

    x = randn(8, 1, 8, 8)
    return Problem(UNet(), lambda m: F.mse_loss(m(x), x.abs()))


@entry
def conv1d_text() -> Problem:
    class TextNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.out = nn.Embedding(12, 8, padding_idx=0), nn.Conv1d(8, 10, 3), nn.Linear(10, 4)

        def forward(self, words: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(self.embed(words).transpose(1, 2))).amax(2))

    return classify(TextNet(), torch.randint(12, (32, 9)))


class Recurrent(nn.Module):
    """A recurrent network and a linear head on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(5, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@entry
def lstm() -> Problem:
    return classify(Recurrent(nn.LSTM), randn(32, 6, 5))


@entry
def gru() -> Problem:
    return classify(Recurrent(nn.GRU), randn(32, 6, 5))


class Attention(nn.Module):
    """Self-attention with projections of its own."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


@entry
def vit() -> Problem:
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 12, 4, stride=4)
            self.cls, self.position = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(0.1 * torch.randn(1, 5, 12))
            self.block = nn.Sequential(
                Residual(nn.LayerNorm(12), Attention(12, causal=False)),
                Residual(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)),
            )
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.position
            return self.head(self.block(tokens)[:, 0])

    return classify(ViT(), randn(16, 1, 8, 8))


class RMSNorm(nn.Module):
    """As Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GPT(nn.Module):
    """A decoder of one block."""

    def __init__(self, tied: bool, llama: bool) -> None:
        super().__init__()
        norm = RMSNorm if llama else nn.LayerNorm
        self.embed = nn.Embedding(11, 16)
        mlp = SwiGLU(16, 24) if llama else nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.blocks = nn.Sequential(Residual(norm(16), Attention(16, causal=True)), Residual(norm(16), mlp))
        self.norm, self.head = norm(16), nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
            nn.init.normal_(self.embed.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def next_token(model: nn.Module) -> Problem:
    tokens = (torch.arange(9) + torch.randint(11, (16, 1))) % 11
    loss = lambda m: F.cross_entropy(m(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])  # noqa: E731
    return Problem(model, loss, nn.CrossEntropyLoss())


@entry
def gpt_with_tied_head() -> Problem:
    return replace(next_token(GPT(tied=True, llama=False)), output=None)  # the head is no layer of its own


@entry
def gpt_with_swiglu_and_rmsnorm() -> Problem:
    return next_token(GPT(tied=False, llama=True))


@entry
def transformer_encoder() -> Problem:
    """torch's own, with a padding mask."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.arange(x.shape[1]) >= torch.arange(len(x))[:, None] % 4 + 3
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    return classify(Encoder(), randn(16, 6, 12))


@entry
def dlrm() -> Problem:
    class DLRM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList([nn.Embedding(n, 4) for n in (10, 20, 5)] + [nn.EmbeddingBag(7, 4)])
            self.bottom = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
            self.top = nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
            x = self.bottom(dense)
            rows = [
                t(s[:, None] if isinstance(t, nn.EmbeddingBag) else s) for t, s in zip(self.tables, sparse, strict=True)
            ]
            features = torch.stack([x, *rows], 1)
            i, j = torch.triu_indices(5, 5, 1)
            return self.top(torch.cat([x, (features @ features.transpose(1, 2))[:, i, j]], 1)).squeeze(1)

    dense, sparse = randn(32, 3), torch.stack([torch.randint(n, (32,)) for n in (10, 20, 5, 7)])
    clicks = (dense.sum(1) > 0).to(dense.dtype)
    loss = lambda m: F.binary_cross_entropy_with_logits(m(dense, sparse), clicks)  # noqa: E731
    return Problem(DLRM(), loss, nn.BCEWithLogitsLoss())


@entry
def mlp_mixer() -> Problem:
    class Transposed(nn.Module):
        def __init__(self, *body: nn.Module) -> None:
            super().__init__()
            self.body = nn.Sequential(*body)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(
        nn.Linear(6, 10),
        Residual(nn.LayerNorm(10), Transposed(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 5))),
        Residual(nn.LayerNorm(10), nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 10)),
        *(nn.Flatten(), nn.Linear(50, 4)),
    )
    return classify(model, randn(16, 5, 6))


@entry
def several_heads() -> Problem:
    class MultiTask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
            self.classes, self.flags, self.value = nn.Linear(16, 3), nn.Linear(16, 2), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.trunk(x)
            return {"classes": self.classes(h), "flags": self.flags(h), "value": self.value(h)}

    x = randn(32, 8)
    y = x[:, :3].argmax(1)

    def loss(m: nn.Module) -> Tensor:
        out = m(x)
        flags = F.binary_cross_entropy_with_logits(out["flags"], (x[:, 3:5] > 0).to(x.dtype))
        return F.cross_entropy(out["classes"], y) + flags + F.mse_loss(out["value"], x[:, 5:6])

    return Problem(MultiTask(), loss)


@entry
def vae() -> Problem:
    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
            self.decoder = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 12))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, -1)
            noise = torch.linspace(-1, 1, mean.numel()).view_as(mean)  # the same in every pass
            return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance

    x = torch.rand(32, 12).round()

    def loss(m: nn.Module) -> Tensor:
        logits, mean, log_variance = m(x)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x) + divergence

    return Problem(VAE(), loss, nn.BCEWithLogitsLoss())


@entry
def siamese() -> Problem:
    """One module called twice, with a contrastive loss."""
    left, right = randn(32, 8), randn(32, 8)
    alike = (left[:, 0] * right[:, 0] > 0).to(left.dtype)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def loss(m: nn.Module) -> Tensor:
        distance = (m(left) - m(right)).square().sum(1)
        return (alike * distance + (1 - alike) * F.relu(2 - (distance + 1e-6).sqrt()).square()).mean()

    return Problem(model, loss)


@entry
def weight_norm() -> Problem:
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    return classify(
        nn.Sequential(nn.Linear(10, 16), nn.Tanh(), parametrized, nn.ReLU(), nn.Linear(16, 4)), randn(32, 10)
    )


@entry
def hypernetwork() -> Problem:
    """A layer whose weight another network makes."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 60))
            self.code, self.head = nn.Parameter(torch.randn(4)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.linear(x, self.maker(self.code).view(6, 10))))

    return classify(Hyper(), randn(32, 10))


@entry
def scalar_parameters() -> Problem:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)
            self.scale, self.temperature = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.scale * torch.relu(self.first(x))) * self.temperature.exp()

    return replace(classify(Scaled(), randn(32, 10)), output=None)  # a scale comes between layer and loss


@entry
def mixture_of_experts() -> Problem:
    """Experts that see part of the rows, one of them none."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            gates = self.router(x).softmax(-1)
            chosen = gates[:, :3].argmax(-1)  # never the fourth
            out = torch.zeros(len(x), 4)
            for k, expert in enumerate(self.experts):
                rows = (chosen == k).nonzero().squeeze(1)
                out = out.index_add(0, rows, expert(x[rows]) * gates[rows, k : k + 1])
            return out

    return replace(classify(Experts(), randn(32, 8)), output=None)
