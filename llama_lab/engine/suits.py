"""Which settings the fast engine of a GPU computes; everything else is TRL's. Nothing here imports torch."""

from __future__ import annotations

from llama_lab.choices import Bias, ComputeDtype, Memory, Optimizer, QuantType, TrainerName
from llama_lab.config import RunConfig

ADAMW = (Optimizer.adamw_torch, Optimizer.adamw_torch_fused, Optimizer.paged_adamw_32bit)
"""The same mathematics; an adapter's states are small enough to stay on the GPU."""


def unsuited(config: RunConfig) -> str | None:
    """The setting for which a GPU trains with TRL's trainer; None where the fast engine does."""
    quant, lora, t = config.quant, config.lora, config.trainer
    reasons = {
        f"trainer.name={t.name}": t.name is not TrainerName.sft,
        "quant.type=int8": quant.type is QuantType.int8,
        f"quant.compute_dtype={quant.compute_dtype}": quant.compute_dtype
        not in (ComputeDtype.auto, ComputeDtype.bfloat16),
        "lora.use_dora=true": lora.use_dora,
        f"lora.bias={lora.bias}": lora.bias is not Bias.none,
        "lora.modules_to_save": bool(lora.modules_to_save),
        f"trainer.optim={t.optim}": t.optim not in ADAMW,
        "trainer.neftune_noise_alpha": t.neftune_noise_alpha is not None,
        "trainer.fp16=true": t.fp16,
        "trainer.bf16=false": t.bf16 is False,
    }
    return next((setting for setting, holds in reasons.items() if holds), None)


def allowed_memory(config: RunConfig) -> tuple[Memory, ...]:
    """The levels that a run may take, the fastest first. Checkpointing asks for the leanest."""
    t = config.trainer
    if t.memory is not Memory.auto:
        return (t.memory,)
    return (Memory.lean,) if t.gradient_checkpointing else (Memory.fast, Memory.balanced, Memory.lean)
