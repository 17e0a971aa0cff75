"""LocoProp on a model with more than linear layers: norms and embeddings go to the fallback optimizer."""

import torch
from torch import nn

from torchloco import LocoProp


class Block(nn.Module):
    def __init__(self, vocabulary: int = 16, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


torch.manual_seed(0)
model = Block()
optimizer = LocoProp(
    model,
    lr=3e-4,
    output=nn.CrossEntropyLoss(),
    fallback=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0),
)
tokens = torch.arange(9).repeat(32, 1) + torch.randint(8, (32, 1))  # counting upwards

for step in range(60):
    optimizer.zero_grad()
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}")

print(optimizer)
