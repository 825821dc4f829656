"""How benchmarks.memory measures: a base is loaded, trained for a few steps and watched, in this process."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset

from llama_lab.choices import Engine
from llama_lab.config import ModelSettings, RunConfig
from llama_lab.engine.choose import choose_for, fit_of
from llama_lab.engine.install import speed_up
from llama_lab.lora import add_adapter, count_params
from llama_lab.model import load_base, load_tokenizer
from llama_lab.params import shape_of
from llama_lab.quant import compute_dtype
from llama_lab.training import FitSettings, peak_memory_gib

NUM_STEPS = 3
"""Optimizer states exist from the second step on; the first step also compiles and is not timed."""
ON_GPU = torch.cuda.is_available()


def measure(configs: list[tuple[RunConfig, bool]], tiny: ModelSettings) -> Iterator[dict[str, Any]]:
    """Train each run for NUM_STEPS steps on one base; its numbers.

    Args:
        configs: runs whose base is the same, and whether their rows differ in length.
        tiny: whose tokenizer pads the rows; they are random numbers already.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns at every product
    tokenizer, before = load_tokenizer(tiny), resident_gib()
    start_peak()
    began = time.perf_counter()
    base = load_base(configs[0][0].model, configs[0][0].quant)
    loaded = {"base_gib": held_gib(), "loading_peak_gib": peak_gib(), "loading_s": time.perf_counter() - began}
    for config, mixed in configs:
        model = add_adapter(base, config.lora, seed=0)
        choice = choose_for(config, model)
        if choice.speeds_up_model:
            speed_up(model)
        found = loaded | {"base_and_adapter_gib": held_gib()} | train(model, tokenizer, config, mixed, choice.engine)
        if not ON_GPU:
            peak = peak_memory_gib() - before
            found = {k: v for k, v in found.items() if not k.endswith("_gib")} | {"peak_memory_gib": peak}
        base = take_off(model)
        del model
        gc.collect()
        if ON_GPU:
            found["left_over_gib"] = held_gib() - loaded["base_gib"]
        yield {k: round(v, 4) for k, v in found.items()}


def train(model: Any, tokenizer: Any, config: RunConfig, mixed: bool, engine: Engine) -> dict[str, float]:
    """Train NUM_STEPS steps; memory of the passes, time of the steps after the first."""
    watch, t = Watch(), config.trainer
    watch.hook(model)
    start_peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(
            trainer=replace(t, max_steps=NUM_STEPS, save_steps=0, warmup_ratio=0.0),
            seed=0,
            checkpoints=Path(folder),
            engine=engine,
            autocast_bf16=ON_GPU and compute_dtype(config.quant)[0] is torch.bfloat16,
        )
        rows = rows_of(config, mixed, model.config.vocab_size)
        tokens = sum(len(row) for row in rows["input_ids"]) / NUM_STEPS
        fitted = fit_of(engine)(model, tokenizer, rows, settings, watch, dict)
    trainable, total = count_params(model)
    return watch.numbers() | {
        "tokens_per_step": tokens,
        "tokens_per_s": 1000 * tokens / watch.step_ms(),
        "step_ms": watch.step_ms(),
        "train_loss": fitted.train_loss,
        "num_trainable_params": trainable,
        "num_params": total,
    }


@dataclass(kw_only=True)
class Watch:
    """A listener that notes the time after every step and the GPU's memory in every pass."""

    times: list[float] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    """GiB at the worst moment of any forward pass, and between a forward pass and the next."""
    after_forward: float = 0.0
    reserved: float = 0.0

    def hook(self, model: Any) -> None:
        """Note the memory of the passes of `model`."""
        model.register_forward_pre_hook(lambda *_: self._passed("backward"))
        model.register_forward_hook(lambda *_: self._passed("forward"))

    def started(self, start_step: int, num_steps: int) -> None:
        self._note()

    def stepped(self, step: int) -> None:
        self._note()

    def logged(self, step: int, metrics: dict[str, float]) -> None: ...

    def saved(self, step: int, checkpoint: Path) -> None: ...

    def ended(self) -> None:
        self._passed("backward")

    def step_ms(self) -> float:
        """Of the steps after the first."""
        return 1000 * (self.times[-1] - self.times[1]) / (len(self.times) - 2)

    def numbers(self) -> dict[str, float]:
        """What was seen, GiB."""
        return {
            "peak_memory_gib": max(self.peaks.values()),
            "peak_reserved_gib": self.reserved,
            "forward_peak_gib": self.peaks["forward"],
            "after_forward_gib": self.after_forward,
            "backward_peak_gib": self.peaks["backward"],
        }

    def _passed(self, name: str) -> None:
        self.peaks[name] = max(self.peaks[name], peak_gib())
        if ON_GPU:
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() / 2**30)
            torch.cuda.reset_peak_memory_stats()
        if name == "forward":
            self.after_forward = max(self.after_forward, held_gib())

    def _note(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def take_off(model: Any) -> Any:
    """The base without adapter, hooks and what TRL put over its forward pass."""
    base = model.unload()
    base.__dict__.pop("forward", None)
    base.gradient_checkpointing_disable()
    base.get_input_embeddings()._forward_hooks.clear()
    return base


def rows_of(config: RunConfig, mixed: bool, vocab_size: int) -> Dataset:
    """Rows of random tokens for NUM_STEPS steps, learned whole. With `mixed` every second one is half as long."""
    num_rows = config.trainer.effective_batch_size * NUM_STEPS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (num_rows, config.dataset.max_length), generator=generator).tolist()
    if mixed:
        ids = [row[: len(row) // (1 + i % 2)] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_base(folder: Path, model: ModelSettings) -> None:
    """A checkpoint in bf16 of the model's shape with random weights.

    They are drawn narrower than transformers does: with its 0.02 every column of down_proj's input holds a number that
    LLM.int8() takes for an outlier and keeps in 16 bits, which a trained model has in few columns.
    """
    from transformers import LlamaConfig

    from benchmarks.make_base import write_weights

    shape = shape_of(model)
    assert shape is not None
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=4096,
        initializer_range=0.01,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    write_weights(folder, config)


def held_gib() -> float:
    """GiB of live tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() / 2**30 if ON_GPU else 0.0


def peak_gib() -> float:
    """GiB of live tensors on the GPU at the worst moment since `start_peak`; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0


def start_peak() -> None:
    """Measure the GPU's peak from here on."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def resident_gib() -> float:
    """Memory of this process, GiB."""
    return psutil.Process().memory_info().rss / 2**30
