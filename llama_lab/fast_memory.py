"""Peak memory of the fast engine on a GPU from a run's settings alone, counted from llama_lab/engine as it allocates.

Measured beside the prediction: benchmarks/speed.py, whose cases hold both. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from llama_lab.activations import FP32
from llama_lab.choices import Memory, QuantType
from llama_lab.config import RunConfig
from llama_lab.params import ModelShape, adapter_tensors

BF16 = 2
HEAD_CHUNK = 1024
"""Tokens whose logits engine/network.py has at once."""
FLASH_BLOCK = 128
"""Tokens to which the backward pass of PyTorch's attention fills up each row of queries. Our own kernels, which some
cards have (engine/turned.py), need less."""


@dataclass(frozen=True, kw_only=True)
class FastRun:
    """The sizes of a run with the fast engine, in bytes."""

    shape: ModelShape
    config: RunConfig
    memory: Memory
    num_tokens: int
    """Of a micro-batch, of all rows of a stack."""
    num_rows: int = 1
    """Adapters that are trained together on the base."""
    rank: int | None = None
    """To which the adapters of a stack are padded; None is lora.r."""

    @property
    def r(self) -> int:
        """Rank of each adapter as it lies in memory."""
        return self.rank or self.config.lora.r

    @cached_property
    def adapter(self) -> int:
        """Numbers of A and B of all adapters."""
        return self.num_rows * sum(adapter_tensors(self.shape, replace(self.config.lora, r=self.r)))

    @property
    def dense_base(self) -> int:
        """What keeping the base dequantised takes beside its 4 bits."""
        is_quantised = self.config.quant.type is not QuantType.none
        return BF16 * self.shape.num_linear_params() if is_quantised and self.memory is Memory.fast else 0

    @property
    def masters(self) -> int:
        """fp32 and the copy in bf16."""
        return (FP32 + BF16) * self.adapter

    @property
    def gradients(self) -> int:
        """bf16; in fp32 as well where micro-batches are added up."""
        adds_up = self.config.trainer.gradient_accumulation_steps > 1
        return (BF16 + (FP32 if adds_up else 0)) * self.adapter

    @property
    def optimizer(self) -> int:
        """Two moments in fp32; in a stack, also to which rank each number belongs."""
        indices = self.adapter // self.num_rows * (1 if self.r < 256 else 2) if self.num_rows > 1 else 0
        return 2 * FP32 * self.adapter + indices

    @property
    def activations(self) -> int:
        """Kept for backward; `lean` keeps what enters each block, and all of the one that it computes again."""
        s, block = self.shape, self.num_tokens * self._kept()
        if self.memory is Memory.lean:
            return self.num_tokens * s.num_layers * BF16 * s.hidden_size + block
        return s.num_layers * block

    @property
    def head(self) -> int:
        """Logits of a chunk and their gradient; hidden states and theirs."""
        s = self.shape
        return min(self.num_tokens, HEAD_CHUNK) * 2 * BF16 * s.vocab_size + 3 * BF16 * self.num_tokens * s.hidden_size

    @property
    def workspace(self) -> int:
        """The widest moment of a block's backward pass, and the weights made whole for a product."""
        s, n = self.shape, self.num_tokens
        rows = self.num_rows * self.config.trainer.per_device_train_batch_size + 1
        attention = (n + FLASH_BLOCK * rows) * FP32 * s.q_size + n * BF16 * (4 * s.q_size + 4 * s.kv_size)
        is_kept = self.memory is Memory.fast or self.config.quant.type is QuantType.none
        whole = 0 if is_kept else BF16 * s.intermediate_size * s.hidden_size
        held = 2 * whole if self.memory is Memory.lean else 0  # gate and up, from recomputation on
        behind_down = held + whole + n * BF16 * (s.intermediate_size + 2 * s.hidden_size)
        behind_gate = held + n * BF16 * (3 * s.intermediate_size + 2 * s.hidden_size)
        behind_mlp = 2 * whole + n * BF16 * (2 * s.intermediate_size + 3 * s.hidden_size)
        return max(attention, behind_down, behind_gate, behind_mlp)

    def _kept(self) -> int:
        """Of one token in one block."""
        s = self.shape
        stream = 2 * s.hidden_size
        attention = s.q_size + 2 * s.kv_size + s.q_size
        return BF16 * (stream + attention + 2 * s.intermediate_size + 7 * self.r) + FP32 * s.num_heads
