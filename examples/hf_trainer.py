"""LocoProp in the Hugging Face Trainer: a tiny Llama, randomly initialised, on the bytes of a Python module."""

import inspect
import json
import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from torchloco import LocoProp

STEPS = 30

if __name__ == "__main__":
    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(json.decoder).encode() * 4))
    rows = text[: len(text) // 64 * 64].view(-1, 64)
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    # torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LocoProp(model, lr=1e-4, output=nn.CrossEntropyLoss())
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler))
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.3f}")
