"""LocoProp in an Accelerate loop, with gradient accumulation, clipping and a scheduler."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchloco import LocoProp

if __name__ == "__main__":
    torch.manual_seed(0)
    centres, labels = torch.randn(10, 20), torch.randint(10, (2000,))
    points = centres[labels] + torch.randn(2000, 20)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = LocoProp(model, lr=1e-4, output=criterion)  # torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    loader = DataLoader(TensorDataset(points, labels), batch_size=100, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(3):
        losses = []
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        accelerator.print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean().item():.3f}")
