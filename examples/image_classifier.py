"""A plain loop on an image classifier with validation and a schedule; its images are drawn here."""

import torch
from torch import nn

from torchloco import LocoProp

torch.manual_seed(0)


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 12 × 12 images of a horizontal bar, a vertical bar, a cross or a square, anywhere."""
    labels = torch.randint(4, (count,))
    images = 0.3 * torch.randn(count, 1, 12, 12)
    for image, label, row, column in zip(images, labels, *torch.randint(6, (2, count)), strict=True):
        shape = torch.zeros(6, 6)
        if label in (0, 2):
            shape[2] = 1
        if label in (1, 2):
            shape[:, 2] = 1
        if label == 3:
            shape[[0, -1]] = shape[:, [0, -1]] = 1
        image[0, row : row + 6, column : column + 6] += shape
    return images, labels


train_images, train_labels = draw(1500)
test_images, test_labels = draw(500)

model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(64, 4)),
)
criterion = nn.CrossEntropyLoss()
EPOCHS, BATCH = 3, 50
optimizer = LocoProp(model, output=criterion)  # torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(train_images) // BATCH)

for epoch in range(EPOCHS):
    model.train()
    for batch in torch.randperm(len(train_images)).split(BATCH):
        optimizer.zero_grad()
        loss = criterion(model(train_images[batch]), train_labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        logits = model(test_images)
    accuracy = (logits.argmax(1) == test_labels).float().mean()
    print(f"epoch {epoch + 1}: test loss {criterion(logits, test_labels):.3f}, accuracy {accuracy:.3f}")
