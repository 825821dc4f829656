"""The standard way to train: TRL's trainer, made resumable to the bit and telling its events to one listener."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from llama_lab.choices import Engine
from llama_lab.config import TrainerSettings
from llama_lab.data.batches import Collator
from llama_lab.errors import ConfigError, RunError
from llama_lab.events import Listener
from llama_lab.loss import summed_loss
from llama_lab.results import FitResult

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PARTIAL = ".partial"
"""The folder in which a checkpoint is written before it gets its name."""


@dataclass(kw_only=True)
class FitSettings:
    """What a way to train needs to know beside model and data."""

    trainer: TrainerSettings
    engine: Engine
    """Fast or standard; the model has been sped up where it is fast."""
    seed: int
    checkpoints: Path
    """Complete checkpoints lie here as checkpoint-STEP."""
    autocast_bf16: bool
    """What trainer.bf16=null means on this device."""
    pad_to_multiple_of: int | None = None
    runtime_before_s: float = 0.0
    """Seconds of training before the checkpoint that is resumed from."""


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: FitSettings,
    listener: Listener,
    evaluate: Callable[[], dict[str, float]],
) -> FitResult:
    """Train the adapter in place, from the last complete checkpoint if there is one.

    Args:
        train: columns input_ids and labels, and seq_lengths where rows are packed (data/batches.py).
        evaluate: held-out numbers of the model as it is, called every trainer.eval_steps steps.
    Raises:
        RunError: the loss is no longer finite.
    """
    start = last_checkpoint(settings.checkpoints)
    shutil.rmtree(settings.checkpoints / PARTIAL, ignore_errors=True)
    teller = _Teller(settings, listener, evaluate, start_step=step_of(start))
    trainer = (_FastTrainer if settings.engine is Engine.fast else _Trainer)(
        model=model,
        args=_sft_config(settings),
        train_dataset=train,
        data_collator=Collator(pad_token_id=tokenizer.pad_token_id, multiple_of=settings.pad_to_multiple_of),
        processing_class=tokenizer,
        callbacks=[teller],
    )
    _keep_fp32(model)
    _take_out_printers(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        listener.ended()
        shutil.rmtree(settings.checkpoints / PARTIAL, ignore_errors=True)
    return FitResult(
        num_steps=trainer.state.global_step,
        train_loss=teller.mean_loss(),
        train_runtime_s=settings.runtime_before_s + teller.seconds(),
        tokens_per_s=teller.tokens_per_s(),
    )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; they get their names only when complete."""
    return max(checkpoints.glob("checkpoint-*"), key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint by its name; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def _sft_config(settings: FitSettings) -> SFTConfig:
    t, cuda = settings.trainer, torch.cuda.is_available()
    if t.fp16 and not cuda:
        raise ConfigError("trainer.fp16=true needs a GPU, and none is here. Type trainer.fp16=false.")
    # transformers renamed gradient_checkpointing; both versions in use are served
    names = {f.name for f in fields(SFTConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    kwargs: dict[str, Any] = {checkpointing: t.gradient_checkpointing}
    return SFTConfig(
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
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **kwargs,
    )


def _keep_fp32(model: PeftModel) -> None:
    # SFTTrainer casts a 4-bit model's adapter to bf16, and a resumed run reloads it as fp32: then the two differ
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.float()


def _take_out_printers(trainer: SFTTrainer) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _Trainer(SFTTrainer):
    """TRL's trainer without a model card in every checkpoint."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint is for going on, not for sharing."""


class _FastTrainer(_Trainer):
    """TRL's trainer with the same loss and without its entropy and accuracy, which are a third of a step on a CPU."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses, learned = summed_loss(model, **inputs)
        return losses / (learned if num_items_in_batch is None else num_items_in_batch)


class _Teller(TrainerCallback):
    """Hears TRL's events, gives checkpoints their names, and tells the listener."""

    def __init__(
        self, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]], start_step: int
    ) -> None:
        self.settings, self.listener, self.evaluate, self.start_step = settings, listener, evaluate, start_step
        self.losses: list[float] = []
        self.started_at = self.paused_s = 0.0
        self.ended_at: float | None = None
        self.eval_every: int | None = None
        self.first_token = self.num_tokens = 0

    def seconds(self) -> float:
        """Seconds of training in this process; evaluation left out."""
        return (self.ended_at or time.monotonic()) - self.started_at - self.paused_s

    def tokens_per_s(self) -> float:
        """Real tokens a second of this process."""
        return self.num_tokens / max(self.seconds(), 1e-9)

    def mean_loss(self) -> float:
        """Mean of the logged losses; NaN where no step was taken."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started_at = time.monotonic()
        self.first_token = state.num_input_tokens_seen
        wanted = self.listener.started(self.start_step, state.max_steps)
        self.eval_every = self.settings.trainer.eval_steps or wanted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_tokens = state.num_input_tokens_seen - self.first_token
        every = self.eval_every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            began = time.monotonic()
            self.listener.logged(state.global_step, self.evaluate())
            self.paused_s += time.monotonic() - began
        control.should_log |= state.global_step == state.max_steps  # a short run has a loss, too
        self.listener.stepped(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"The training loss is {logs['loss']} at step {state.global_step}. Type a smaller "
                f"trainer.learning_rate than {self.settings.trainer.learning_rate:g}, or trainer.max_grad_norm=0.3."
            )
        self.losses.append(logs["loss"])
        self.listener.logged(state.global_step, self._metrics(logs))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        name = f"checkpoint-{state.global_step}"
        partial, final = self.settings.checkpoints / PARTIAL / name, self.settings.checkpoints / name
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._drop_old()
        self.listener.saved(state.global_step, final)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended_at = time.monotonic()

    def _metrics(self, logs: dict[str, float]) -> dict[str, float]:
        metrics = {f"train/{key}": logs[key] for key in ("loss", "grad_norm", "learning_rate", "epoch") if key in logs}
        metrics["train/tokens_per_s"] = self.tokens_per_s()
        metrics["train/runtime_s"] = self.settings.runtime_before_s + self.seconds()
        metrics["train/peak_memory_gib"] = peak_memory_gib()
        return metrics

    def _drop_old(self) -> None:
        limit = self.settings.trainer.save_total_limit
        kept = sorted(self.settings.checkpoints.glob("checkpoint-*"), key=step_of)
        for old in kept[: -limit if limit else 0]:
            # renamed first: a kill during the removal must not leave half a checkpoint under a checkpoint's name
            doomed = self.settings.checkpoints / PARTIAL / f"old-{old.name}"
            doomed.parent.mkdir(exist_ok=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _flush(folder: Path) -> None:
    """Wait until the disk has the files: a name must never outlive a power cut that its content did not."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
