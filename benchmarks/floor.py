"""The least time of a step: what it multiplies, at the speed at which a card multiplies.

Counted from the shape of the model, for real tokens. A weight of a linear layer (lm_head is one) takes 2 operations a
token forward and 2 backward, for the gradient of what enters it; frozen weights get no gradient of their own. A and B
of LoRA do, which takes 2 more. `lean` computes the blocks a second time. For each time that the whole base is
dequantised the time of that is added.

Left out: attention, whose share depends on how long rows are; norms, dropout, the gate, the loss and the optimizer;
and reading weights, which at 256 tokens takes about as long as multiplying does. A whole second time is more than
`lean` of llama_lab/engine/block.py needs: it computes no down_proj again, and dequantises gate and up once for both
backward and what it computes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_lab.choices import Memory, QuantType
from llama_lab.compose import compose_words
from llama_lab.config import LoraSettings, RunConfig
from llama_lab.params import SHAPES, ModelShape, adapted_linears

SEVEN = SHAPES["llama2_7b"]
"""The shape of every row of speed_gpu.py."""
OPERATIONS = 2
"""A weight and a token: one multiplication, one addition."""
PASSES = {Memory.fast: 0, Memory.balanced: 2, Memory.lean: 3}
"""How often a step dequantises the whole base: forward, backward, and for what is computed again."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """How fast a GPU is."""

    tflops: float
    """10**12 operations a second of products in bf16 with sums in fp32."""
    pass_ms: float
    """Dequantising all linear layers of a Llama-2-7B from 4 bits to bf16 once."""


H100 = Card(tflops=798, pass_ms=5.4)
"""Measured on one before the first commit. A step of 2,048 tokens reaches 96% of it in the base's products
(benchmarks/results/speed_profile.json)."""
CARDS = {
    "NVIDIA H100 80GB HBM3": H100,
    # The same chip with memory of 4.8 instead of 3.35 TB/s (NVIDIA's data sheets), which is what dequantising waits for
    "NVIDIA H200": Card(tflops=H100.tflops, pass_ms=H100.pass_ms * 3.35 / 4.8),
}
"""By the name that PyTorch gives."""


def base_flop(shape: ModelShape, memory: Memory) -> int:
    """Operations a token in products with frozen weights."""
    head = shape.vocab_size * shape.hidden_size
    return OPERATIONS * (2 * (shape.num_linear_params() + head) + _again(memory) * shape.num_linear_params())


def lora_flop(shape: ModelShape, lora: LoraSettings, memory: Memory) -> int:
    """Operations a token in products with A and B, and in those that give their gradients."""
    weights = sum(lora.r * (linear.d_in + linear.d_out) for linear in adapted_linears(shape, lora))
    return OPERATIONS * (3 + _again(memory)) * weights


def dequantising_ms(shape: ModelShape, quant: QuantType, memory: Memory, card: Card) -> float:
    """Of one micro-batch; none where the base is kept dequantised, or is not quantised."""
    if quant is QuantType.none:
        return 0.0
    return PASSES[memory] * card.pass_ms * shape.num_linear_params() / SEVEN.num_linear_params()


def floor_ms(shape: ModelShape, config: RunConfig, memory: Memory, card: Card, *, num_tokens: float) -> float:
    """The least time of a step of one micro-batch.

    Args:
        memory: the level that the run took, not `auto`.
        num_tokens: of a step, padding left out.
    """
    flop = base_flop(shape, memory) + lora_flop(shape, config.lora, memory)
    return multiplying_ms(num_tokens * flop, card) + dequantising_ms(shape, config.quant.type, memory, card)


def multiplying_ms(flop: float, card: Card) -> float:
    """So many operations at the card's full speed."""
    return flop / card.tflops / 1e9


def row_floor_ms(row: dict[str, Any], level: Memory | None = None) -> float | None:
    """The least time of a step of a row of ours in speed.json or speed_sweep.json; None for a card not in CARDS.

    Args:
        level: as if the row had taken this one.
    Raises:
        ValueError: the row does not say which level trainer.memory=auto took.
    """
    card = CARDS.get(row["card"])
    if card is None:
        return None
    config = compose_words(["model=llama2_7b", *row["settings"]])
    memory = level or Memory(row.get("memory") or config.trainer.memory)
    if memory is Memory.auto:
        raise ValueError(f"case {row['case']!r}: add 'memory', the level that trainer.memory=auto took")
    return floor_ms(SEVEN, config, memory, card, num_tokens=row["tokens_per_step"])


def _again(memory: Memory) -> int:
    """How often a block is computed a second time."""
    return 1 if memory is Memory.lean else 0
