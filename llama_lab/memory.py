"""Peak memory of a training run from its settings alone: no weights are read, no GPU is touched, torch is not imported.

The bytes are counted from the code that allocates them: transformers' Llama, PEFT's layers, bitsandbytes' products and
TRL's loss, as trainer.py runs them. Measured on a GPU beside the prediction: benchmarks/memory.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from llama_lab.activations import FP32, Block, Device, Precision, precision
from llama_lab.choices import Engine, Memory, Optimizer, QuantType
from llama_lab.config import RunConfig
from llama_lab.engine.suits import allowed_memory, unsuited
from llama_lab.fast_memory import BF16, FastRun
from llama_lab.kept_bytes import base_bytes, optimizer_bytes
from llama_lab.params import ModelShape, adapted_linears, adapter_tensors
from llama_lab.trainer_config import TrainerSettings

GIB = 2**30
LOSS_TILE = (4096, 32768)
"""TRL's loss takes so many tokens and words at a time and keeps no logits (trl/kernels/chunked_logprob.py)."""
CUBLAS_BYTES = 64 * 2**20
"""Buffers of cuBLAS and cuBLASLt on a GPU. Measured on an H100; smaller on older ones."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What lies in memory at the worst moment of training, GiB (2**30 bytes)."""

    base: float
    """The frozen base as it is stored; on a CPU with the dequantised copies that quant.py keeps."""
    adapter: float
    """Trainable parameters in fp32."""
    gradients: float
    """fp32; those that exist at that moment."""
    optimizer: float
    """Optimizer states; paged ones are left out on a GPU, as they can move to the CPU's memory."""
    activations: float
    """What the forward pass keeps for the backward pass."""
    logits: float
    """What the loss needs at that moment."""
    workspace: float
    """Gradients of activations, weights made whole for a product, the adapter's bf16 copy, cuBLAS' buffers."""

    @property
    def total(self) -> float:
        """Predicted peak, GiB."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """The parts by name, GiB."""
        return dict(vars(self))


def estimate(
    shape: ModelShape,
    config: RunConfig,
    *,
    length: int,
    device: Device = Device.gpu,
    padded: bool = False,
    room_gib: float = 0.0,
) -> MemoryEstimate:
    """Predicted peak of training, in the memory of the GPU or, on a CPU, beyond what the libraries take.

    Args:
        length: tokens of the longest row, padding included.
        padded: rows of a batch differ in length, or are packed: attention then needs a mask.
        room_gib: what trainer.memory=auto may take; where nothing fits, it is the leanest.
    """
    if is_fast(config, device):
        return estimate_fast(shape, config, fastest_fit(shape, config, length=length, room_gib=room_gib), length=length)
    return max(_Run(shape, config, length, device, padded).moments(), key=lambda moment: moment.total)


def is_fast(config: RunConfig, device: Device) -> bool:
    """Whether the fast engine of a GPU trains this run."""
    return device is Device.gpu and config.trainer.engine is not Engine.standard and unsuited(config) is None


def fastest_fit(
    shape: ModelShape,
    config: RunConfig,
    *,
    length: int,
    room_gib: float,
    num_rows: int = 1,
    rank: int | None = None,
) -> Memory:
    """trainer.memory; of `auto` the fastest level whose predicted peak is within the room, else the leanest."""

    def peak_gib(level: Memory) -> float:
        return estimate_fast(shape, config, level, length=length, num_rows=num_rows, rank=rank).total

    levels = allowed_memory(config)
    return next((level for level in levels if peak_gib(level) <= room_gib), levels[-1])


def estimate_fast(
    shape: ModelShape,
    config: RunConfig,
    memory: Memory,
    *,
    length: int,
    num_rows: int = 1,
    rank: int | None = None,
) -> MemoryEstimate:
    """Predicted peak of the fast engine at one level of trainer.memory.

    Args:
        num_rows: adapters that are trained together on one base (stacked/), each with a micro-batch of its own.
        rank: to which they are padded; None is lora.r.
    """
    run = FastRun(
        shape=shape,
        config=config,
        memory=memory,
        num_tokens=num_rows * rows_at_once(config.trainer) * length,
        num_rows=num_rows,
        rank=rank,
    )
    types = Precision(compute=BF16, adapter=BF16)
    return MemoryEstimate(
        base=(base_bytes(shape, config.quant, types, Device.gpu) + run.dense_base) / GIB,
        adapter=run.masters / GIB,
        gradients=run.gradients / GIB,
        optimizer=run.optimizer / GIB,
        activations=run.activations / GIB,
        logits=run.head / GIB,
        workspace=(run.workspace + CUBLAS_BYTES) / GIB,
    )


@dataclass(frozen=True)
class _Run:
    """A run's sizes in bytes."""

    shape: ModelShape
    config: RunConfig
    length: int
    device: Device
    padded: bool

    def moments(self) -> Iterator[MemoryEstimate]:
        """The moments that can be the worst: the loss, backward in the last and in the first block, the step."""
        t = self.config.trainer
        first_gradients = self.gradients if rows_at_once(t) < t.effective_batch_size else 0
        waiting = self.activations + self.head
        copy = 0 if self.checkpointing else self.adapter_copy
        one_block = self.tokens * max(block.kept() for block in self.blocks)
        recomputed = one_block if self.checkpointing else 0
        yield self._moment(first_gradients, waiting, self.logits, copy)
        yield self._moment(first_gradients, waiting + recomputed, 0, copy + self.product)
        yield self._moment(self.gradients, self.kept_by_int8 + one_block, 0, self.product)
        yield self._moment(self.gradients, 0, 0, self.step)

    def _moment(self, gradients: float, activations: float, logits: float, workspace: float) -> MemoryEstimate:
        return MemoryEstimate(
            base=base_bytes(self.shape, self.config.quant, self.precision, self.device) / GIB,
            adapter=FP32 * sum(self.tensors) / GIB,
            gradients=gradients / GIB,
            optimizer=optimizer_bytes(self.tensors, self.config.trainer.optim, self.device) / GIB,
            activations=activations / GIB,
            logits=logits / GIB,
            workspace=(workspace + (CUBLAS_BYTES if self.on_gpu else 0)) / GIB,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device is not Device.cpu

    @property
    def checkpointing(self) -> bool:
        return self.config.trainer.gradient_checkpointing

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return rows_at_once(self.config.trainer) * self.length

    @cached_property
    def precision(self) -> Precision:
        return precision(self.config, self.device)

    @cached_property
    def tensors(self) -> list[int]:
        return adapter_tensors(self.shape, self.config.lora)

    @property
    def gradients(self) -> int:
        return FP32 * sum(self.tensors)

    @property
    def adapter_copy(self) -> int:
        """Autocast keeps A and B in its own type until the backward pass has read them."""
        return self.precision.adapter * sum(self.tensors) if self.precision.autocast else 0

    @cached_property
    def blocks(self) -> dict[Block, int]:
        """The kinds of blocks, and how many there are of each."""
        names: list[set[str]] = [set() for _ in range(self.shape.num_layers)]
        for linear in adapted_linears(self.shape, self.config.lora):
            names[linear.layer].add(linear.name)
        return {self._block(kind): number for kind, number in Counter(map(frozenset, names)).items()}

    def _block(self, names: frozenset[str]) -> Block:
        lora = self.config.lora
        return Block(
            shape=self.shape,
            names=names,
            r=lora.r,
            dropout=lora.dropout > 0,
            dora=lora.use_dora,
            quant=self.config.quant.type,
            precision=self.precision,
            attention=self.config.model.attn_implementation,
            length=self.length,
            padded=self.padded,
            on_gpu=self.on_gpu,
        )

    @property
    def kept_by_int8(self) -> int:
        return self.tokens * sum(number * block.kept_by_int8() for block, number in self.blocks.items())

    @property
    def activations(self) -> int:
        """Of all blocks; with checkpointing each keeps its input alone."""
        if not self.checkpointing:
            return self.tokens * sum(number * block.kept() for block, number in self.blocks.items())
        per_token = self.shape.num_layers * self.stream * self.shape.hidden_size
        return self.tokens * per_token + self.kept_by_int8

    @property
    def stream(self) -> int:
        """Bytes of a number that goes from block to block."""
        return max(block.stream() for block in self.blocks)

    @property
    def head(self) -> int:
        """The last norm's input in fp32, its output, and the loss' copy of it."""
        return self.tokens * self.shape.hidden_size * (FP32 + 2 * self.stream)

    @property
    def logits(self) -> int:
        """On a GPU one tile of logits and the gradient of the hidden states; on a CPU all logits and their gradient."""
        tokens, c = self.tokens, self.precision.compute
        if self.on_gpu:
            tile = min(tokens, LOSS_TILE[0]) * LOSS_TILE[1] * min(c, self.precision.adapter)
            return tile + tokens * self.shape.hidden_size * (FP32 + c)
        return tokens * self.shape.vocab_size * (c + 2 * FP32)

    @property
    def product(self) -> int:
        """What the backward pass of one linear layer needs beside what was kept; down_proj is the widest."""
        s, c = self.shape, self.precision.compute
        whole = 0 if self.config.quant.type is QuantType.none else c * s.hidden_size * s.intermediate_size
        moving = c * s.intermediate_size
        if any("down_proj" in block.names and not block.reads_as_it_is() for block in self.blocks):
            moving += (FP32 + c) * s.intermediate_size  # the gradient of PEFT's fp32 copy, before and after its cast
        return max(whole, self._dora) + self.tokens * moving

    @property
    def _dora(self) -> int:
        """DoRA multiplies the identity by A and B to add up B A and the weight (peft/tuners/lora/dora.py)."""
        if not self.config.lora.use_dora:
            return 0
        linears = adapted_linears(self.shape, self.config.lora)
        return max((6 * linear.d_in * (linear.d_in + linear.d_out) for linear in linears), default=0)

    @property
    def step(self) -> int:
        """PyTorch's own AdamW takes the root of all second moments at once; the others go tensor by tensor."""
        at_once = self.config.trainer.optim is Optimizer.adamw_torch
        return FP32 * (sum(self.tensors) if at_once else max(self.tensors, default=0))


def rows_at_once(trainer: TrainerSettings) -> int:
    """Rows of a micro-batch; trainer.micro_batch_size=auto is decided by what fits (cards.largest_micro_batch)."""
    wanted = trainer.micro_batch_size
    return int(wanted) if wanted is not None and wanted.isdecimal() else trainer.per_device_train_batch_size
