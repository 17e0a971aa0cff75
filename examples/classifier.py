"""Train a small classifier with LocoProp-M: the ten-line use, on data that needs no download."""

import torch
from torch import nn

from torchloco import LocoProp

torch.manual_seed(0)
centres = torch.randn(10, 20)
labels = torch.randint(10, (2000,))
images = centres[labels] + torch.randn(2000, 20)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
criterion = nn.CrossEntropyLoss()
optimizer = LocoProp(model, lr=1e-4, output=criterion)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)

for epoch in range(5):
    for batch in torch.randperm(2000).split(200):
        optimizer.zero_grad()
        loss = criterion(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy.item():.3f}")

print(optimizer)
