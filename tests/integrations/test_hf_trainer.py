"""The Hugging Face Trainer: accumulation, mixed precision, checkpointing, its own schedulers, exact resumption."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp

transformers = pytest.importorskip("transformers", reason="pip install 'torchloco[integrations]'")
pytest.importorskip("accelerate", reason="pip install 'torchloco[integrations]'")

LENGTH = 16


@pytest.fixture
def dataset():
    """Counting upwards from anywhere, modulo 16."""
    starts = torch.randint(16, (64, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (torch.arange(LENGTH) + starts) % 16]


def llama(dropout=0.0):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            attention_dropout=dropout,
        )
    )


def trainer_of(model, optimizer, dataset, folder, eval_dataset=None, **options):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return transformers.Trainer(
        model, arguments, train_dataset=dataset, eval_dataset=eval_dataset, optimizers=(optimizer, None)
    )


def losses_of(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_output_is_found_in_the_loss_that_the_model_computes(dataset, tmp_path):
    model = llama()
    optimizer = LocoProp(model, lr=1e-4, output=nn.CrossEntropyLoss())
    trainer_of(model, optimizer, dataset, tmp_path).train()
    found = {info.name: (info.transfer.name, info.source) for info in optimizer.layers}
    assert found["lm_head"][0] == "softmax"
    assert found["model.layers.0.mlp.gate_proj"][0] == "silu"
    assert found["model.layers.0.mlp.up_proj"][0] == "identity"
    assert set(optimizer.fallback_parameters) == {
        name for name, _ in model.named_parameters() if "norm" in name or "embed" in name
    }


def test_accumulation_equals_the_big_batch(dataset, tmp_path, values):
    results = []
    for size, parts in ((16, 1), (4, 4)):
        model = llama()
        optimizer = LocoProp(model, lr=1e-3, solver=torch.optim.SGD, fallback=torch.optim.SGD)
        trainer = trainer_of(
            model, optimizer, dataset, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts
        )
        trainer.train()
        results.append(values(model))
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3},
    ],
    ids=["plain", "bf16", "checkpointing", "re-entrant checkpointing", "clipping and a scheduler"],
)
def test_loss_falls(options, dataset, tmp_path):
    model = llama()
    optimizer = LocoProp(model, lr=1e-4)
    trainer = trainer_of(model, optimizer, dataset, tmp_path, max_steps=20, **options)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.9 * losses[0]


def test_the_trainers_scheduler_reaches_layers_and_fallback(dataset, tmp_path):
    model = llama()
    optimizer = LocoProp(model, lr=1e-4)
    rates = [group["lr"] for group in optimizer.param_groups]
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append([group["lr"] for group in opt.param_groups]))
    trainer_of(model, optimizer, dataset, tmp_path, lr_scheduler_type="linear").train()
    assert_close(seen, [[rate * (4 - k) / 4 for rate in rates] for k in range(4)])


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_resumes_exactly(options, dataset, tmp_path, values, same):
    def run(folder, steps, resume=None, dropout=0.1):
        model = llama(dropout)
        optimizer = LocoProp(model, lr=1e-4)
        trainer = trainer_of(
            model, optimizer, dataset, folder, max_steps=steps, save_strategy="steps", save_steps=3, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, values(model)

    straight, expected = run(tmp_path / "a", 6)
    resumed, got = run(tmp_path / "b", 6, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert losses_of(resumed)[3:] == losses_of(straight)[3:]
    assert same(got, expected)


def test_evaluation_between_steps_changes_nothing(dataset, tmp_path, values, same):
    results = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = llama()
        trainer = trainer_of(model, LocoProp(model, lr=1e-4), dataset, tmp_path, eval_dataset=dataset[:8], **options)
        trainer.train()
        results.append(values(model))
    assert same(*results)


def test_optimizer_class_is_told_to_take_the_model(dataset, tmp_path):
    """The Trainer hands a class param groups; LocoProp needs the model."""
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = transformers.Trainer(
        llama(), arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(LocoProp, {"lr": 1e-4})
    )
    with pytest.raises(TypeError, match="first argument must be the model"):
        trainer.train()


def test_gpt2(dataset):
    """Its linear layers are a class of their own, with transposed weights; its head is tied."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = LocoProp(model)
    rows = torch.stack([entry["labels"] for entry in dataset])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [info.shape for info in optimizer.layers] == 2 * [(48, 16), (16, 16), (64, 16), (16, 64)]
