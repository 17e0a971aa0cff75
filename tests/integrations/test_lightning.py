"""Lightning: its closure, accumulation, clipping, mixed precision, manual optimization, exact resumption."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from torchloco import LocoProp

lightning = pytest.importorskip("lightning", reason="pip install 'torchloco[integrations]'")

# Lightning's own warnings: of torch's pytree, of loaders without workers, of steps that are fewer than a log interval.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Net(lightning.LightningModule):
    def __init__(self, make=None, scheduled=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.make = make or (lambda module: LocoProp(module, lr=1e-3, output=module.criterion))
        self.scheduled = scheduled
        self.losses = []

    def training_step(self, batch, index):
        loss = self.criterion(self.body(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("loss", self.criterion(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make(self)
        if not self.scheduled:
            return optimizer
        scheduler = LinearLR(optimizer, 0.1, total_iters=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(batch=8, rows=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch)


def fit(module, data, folder=None, resume=None, **options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    trainer = lightning.Trainer(**{**defaults, **options})
    trainer.fit(module, data, loader(rows=16), ckpt_path=resume)
    return trainer


def plain(module, data, epochs=2, clip=None):
    """What the Trainer should do, as a plain loop."""
    optimizer = module.make(module)
    losses = []
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss = module.criterion(module.body(x), y)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_the_plain_loop(clip, values, same):
    trained, expected = Net(), Net()
    losses = plain(expected, loader(), clip=clip)
    fit(trained, loader(), gradient_clip_val=clip)
    if clip is None:
        assert trained.losses == losses
        assert same(values(trained), values(expected))
    else:  # the norm is a sum over the parameters in the optimizer's order
        assert_close(trained.losses, losses, rtol=1e-4, atol=1e-4)


def test_accumulation_equals_the_big_batch(values):
    small, big = (Net(lambda m: LocoProp(m, lr=1e-2, solver=torch.optim.SGD)) for _ in range(2))
    fit(small, loader(4), accumulate_grad_batches=4)
    fit(big, loader(16))
    assert_close(values(small), values(big), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_loss_falls(precision):
    module = Net(scheduled=True)
    fit(module, loader(), precision=precision, max_epochs=12)
    assert module.losses[-1] < 0.8 * module.losses[0]


def test_clipping_by_value_is_refused():
    with pytest.raises(RuntimeError, match="do not clip by value"):
        fit(Net(), loader(), gradient_clip_val=1e-3, gradient_clip_algorithm="value")


def test_resumes_exactly(tmp_path, values, same):
    straight, first, resumed = (Net(scheduled=True) for _ in range(3))
    fit(straight, loader(), max_epochs=4)
    half = fit(first, loader(), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, loader(), max_epochs=4, resume=tmp_path / "half.ckpt")
    assert first.losses + resumed.losses == straight.losses
    assert same(values(resumed), values(straight))


def test_manual_optimization(values, same):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.criterion(self.body(batch[0]), batch[1])
            self.losses.append(loss.item())
            self.manual_backward(loss)
            optimizer.step()

    manual, expected = Manual(), Net()
    fit(manual, loader())
    assert manual.losses == plain(expected, loader())
    assert same(values(manual), values(expected))


def test_two_optimizers(values):
    """LocoProp on one part, AdamW on another, in turns."""

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.head = nn.Linear(3, 3)

        def configure_optimizers(self):
            return LocoProp(self.body, lr=1e-3), torch.optim.AdamW(self.head.parameters(), lr=1e-3)

        def training_step(self, batch, index):
            optimizer = self.optimizers()[index % 2]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.criterion(self.head(self.body(batch[0])), batch[1])
            self.losses.append(loss.item())
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        def validation_step(self, batch, index):
            pass

    module = Two()
    before = values(module)
    fit(module, loader(), max_epochs=6)
    assert module.losses[-1] < module.losses[0]
    assert all(not torch.equal(before[name], p) for name, p in values(module).items())
