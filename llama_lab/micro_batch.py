"""How many rows go through the model at once: trainer.micro_batch_size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama_lab.activations import Device
from llama_lab.cards import USABLE_SHARE, Card, largest_micro_batch, nearest_fit
from llama_lab.choices import Memory
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError
from llama_lab.memory import estimate_fast, fastest_fit
from llama_lab.params import ModelShape
from llama_lab.trainer_config import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What decides about the memory of a micro-batch beside the settings."""

    longest: int
    """Tokens of the longest row or block."""
    padded: bool
    """Rows of a batch differ in length, or are packed."""


def resolve(config: RunConfig, shape: ModelShape, rows: Rows) -> tuple[TrainerSettings, str | None]:
    """The trainer's settings with the micro-batch that was asked for; and, of `auto`, one line that says what it took.

    Raises:
        ConfigError: not even one row fits; names the nearest change that does.
    """
    wanted, trainer = config.trainer.micro_batch_size, config.trainer
    if wanted is None:
        return trainer, None
    if wanted != "auto":
        return trainer.with_micro_batch(int(wanted)), None
    name, memory, kind = _memory()
    size = largest_micro_batch(shape, config, memory_gib=memory, length=rows.longest, device=kind, padded=rows.padded)
    if size is None:
        raise ConfigError(_too_large(config, shape, rows, name, memory, kind))
    chosen = trainer.with_micro_batch(size)
    return chosen, (
        f"Micro-batch: {size} rows of up to {rows.longest:,} tokens at once, the most that fit in {USABLE_SHARE:.0%} "
        f"of the {memory:.1f} GiB of {name}; {chosen.gradient_accumulation_steps} of them make a step of "
        f"{trainer.effective_batch_size} rows"
    )


def memory_level(
    config: RunConfig, shape: ModelShape, longest: int, *, num_rows: int = 1, rank: int | None = None
) -> tuple[Memory, str]:
    """What the fast engine may keep on this GPU, and one line that says why.

    Args:
        num_rows: adapters that are trained together on one base, padded to `rank`.
    """
    name, memory, _ = _memory()
    room = USABLE_SHARE * memory
    level = fastest_fit(shape, config, length=longest, room_gib=room, num_rows=num_rows, rank=rank)
    total = estimate_fast(shape, config, level, length=longest, num_rows=num_rows, rank=rank).total
    asked = "asked for" if config.trainer.memory is level else f"the fastest that fits in {room:.0f} GiB of {name}"
    stacked = f" of data, {num_rows} adapters" if num_rows > 1 else ""
    return (
        level,
        f"Engine: fast, memory {level} ({asked}): at most {total:.1f} GiB for {longest:,} tokens a row{stacked}",
    )


def _memory() -> tuple[str, float, Device]:
    """Name, GiB and kind of what this process computes on; of a CPU the memory that is free."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(index).total_memory / 2**30
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name(index), total, Device.gpu if has_bf16 else Device.gpu_without_bf16
    import psutil

    return "free memory", psutil.virtual_memory().available / 2**30, Device.cpu


def _too_large(config: RunConfig, shape: ModelShape, rows: Rows, name: str, memory: float, kind: Device) -> str:
    row = f"one row of {rows.longest:,} tokens"
    said = f"trainer.micro_batch_size=auto: not even {row} fits in {memory:.1f} GiB of {name}."
    if kind is Device.cpu:
        return f"{said} Type a smaller dataset.max_length, or trainer.gradient_checkpointing=true."
    card = Card(name=name, memory_gib=memory, bf16=kind is Device.gpu)
    words = nearest_fit(shape, config, card, length=rows.longest, padded=rows.padded)
    return f"{said} Type {' '.join(words)}" if words else f"{said} Nothing but a larger card helps."
