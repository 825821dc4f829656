"""Our settings as the arguments that transformers and TRL share. Imports no trainer of TRL's, which takes a second."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from llama_lab.checkpoints import PARTIAL
from llama_lab.errors import ConfigError
from llama_lab.training import FitSettings


def shared_arguments(settings: FitSettings) -> dict[str, Any]:
    """What a trainer of TRL or transformers is told of our settings.

    Raises:
        ConfigError: trainer.fp16=true without a GPU.
    """
    t, cuda = settings.trainer, torch.cuda.is_available()
    if t.fp16 and not cuda:
        raise ConfigError("trainer.fp16=true needs a GPU, and none is here. Type trainer.fp16=false.")
    # transformers renamed gradient_checkpointing; both versions in use are served
    names = {f.name for f in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return dict(
        output_dir=str(settings.checkpoints / PARTIAL),
        seed=settings.seed,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=str(t.lr_scheduler_type),
        warmup_steps=t.warmup_ratio,  # a float below 1 is a share of the steps
        optim=str(t.optim),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        train_sampling_strategy="group_by_length" if t.group_by_length else "random",
        neftune_noise_alpha=t.neftune_noise_alpha,
        bf16=settings.autocast_bf16 if t.bf16 is None else t.bf16,
        fp16=t.fp16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=t.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if t.save_steps else "no",
        save_steps=t.save_steps or 500,
        eval_strategy="no",  # `evaluate` measures, the same for both ways to train
        report_to="none",
        disable_tqdm=True,
        **{checkpointing: t.gradient_checkpointing},
    )
