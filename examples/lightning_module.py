"""LocoProp in a LightningModule: only configure_optimizers knows of it."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchloco import LocoProp


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return self.criterion(self.model(x), y)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("loss", self.criterion(self.model(x), y))

    def configure_optimizers(self):
        # torch.optim.AdamW(self.parameters(), lr=1e-3)
        optimizer = LocoProp(self, lr=1e-4, output=self.criterion)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_end(self) -> None:
        print(f"validation loss {self.trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    lightning.seed_everything(0)
    centres, labels = torch.randn(10, 20), torch.randint(10, (2500,))
    points = centres[labels] + torch.randn(2500, 20)
    train = DataLoader(TensorDataset(points[:2000], labels[:2000]), batch_size=100, shuffle=True)
    validation = DataLoader(TensorDataset(points[2000:], labels[2000:]), batch_size=500)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        gradient_clip_val=1.0,  # by norm; clipping by value is refused
        accumulate_grad_batches=2,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), train, validation)
