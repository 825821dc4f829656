"""What one decoder block keeps between its forward and its backward pass, in bytes a token.

Each line was compared with the tensors that autograd saves and with a GPU's peaks (benchmarks/memory.py). `c` are the
bytes of a number of the base's activations, `a` those of the adapter's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llama_lab.choices import Attention, ComputeDtype, QuantType
from llama_lab.config import RunConfig
from llama_lab.params import ModelShape

FP32 = 4


class Device(StrEnum):
    """What a run computes on, as far as quant.compute_dtype=auto depends on it (quant.compute_dtype)."""

    gpu = "gpu"
    """Computes in bf16."""
    gpu_without_bf16 = "gpu_without_bf16"
    """Older than Ampere, such as a T4: computes in fp16."""
    cpu = "cpu"
    """Computes in fp32."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The types in which a run computes."""

    compute: int
    """Bytes of a number of the base's activations."""
    adapter: int
    """Bytes of a number of the adapter's activations: 2 under autocast, else the adapter's own fp32."""

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.adapter != FP32


def precision(config: RunConfig, device: Device) -> Precision:
    """What quant.compute_dtype, trainer.bf16 and trainer.fp16 mean on a device."""
    compute, t = config.quant.compute_dtype, config.trainer
    if compute is ComputeDtype.auto:
        chosen = {Device.gpu: ComputeDtype.bfloat16, Device.gpu_without_bf16: ComputeDtype.float16}
        compute = chosen.get(device, ComputeDtype.float32)
    bf16 = (device is not Device.cpu and compute is ComputeDtype.bfloat16) if t.bf16 is None else t.bf16
    return Precision(compute=4 if compute is ComputeDtype.float32 else 2, adapter=2 if bf16 or t.fp16 else FP32)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block with the adapters it gets."""

    shape: ModelShape
    names: frozenset[str]
    """Its linear layers that have an adapter."""
    r: int
    dropout: bool
    dora: bool
    quant: QuantType
    precision: Precision
    attention: Attention
    length: int
    """Tokens of a row, padding included."""
    padded: bool
    """Rows of a batch differ in length, so that attention needs a mask."""
    on_gpu: bool

    def kept(self) -> int:
        """Bytes a token that are kept for the backward pass."""
        return self._norms() + self._attention() + self._mlp() + self._adapters()

    def kept_by_int8(self) -> int:
        """Of these, what bitsandbytes' int8 product keeps out of autograd's sight: checkpointing cannot drop it."""
        if self.quant is not QuantType.int8:
            return 0
        s = self.shape
        return self.precision.compute * (2 * s.hidden_size + s.q_size + s.intermediate_size)

    def _norms(self) -> int:
        return 2 * FP32 * self.shape.hidden_size  # each RMSNorm keeps its input in fp32

    def _attention(self) -> int:
        s, c = self.shape, self.precision.compute
        queries, keys = s.q_size, 2 * s.kv_size
        if self.attention is Attention.eager:
            # keys repeated for each query head; the softmax of every pair in fp32, and again in the compute type
            return c * 3 * queries + s.num_heads * self.length * (FP32 + (c if c < FP32 else 0))
        if not self.padded:
            return c * (2 * queries + keys) + FP32 * s.num_heads
        # a mask rules out flash attention: key heads are repeated for each query head, and every block turns the mask
        # of all pairs of tokens into numbers of its own
        return c * 4 * queries + FP32 * s.num_heads + c * self.length

    def _mlp(self) -> int:
        return 3 * self.stream() * self.shape.intermediate_size  # gate, SiLU of gate, up

    def stream(self) -> int:
        """Bytes of a number that goes from layer to layer."""
        # DoRA multiplies by fp32 magnitudes, and PEFT's quantised layers do not cast the product back
        return FP32 if self.dora and self.quant is not QuantType.none else self.precision.compute

    def _adapters(self) -> int:
        s, a = self.shape, self.precision.adapter
        sizes = {name: s.linears()[name] for name in sorted(self.names)}
        kept = self._inputs({name: d_in for name, (d_in, _) in sizes.items()}) + a * self.r * len(sizes)
        if self.dora:
            # both terms of the sum that the magnitudes scale; o_proj's input comes from attention, in the compute type
            kept += sum((a + (a if name == "o_proj" else self.stream())) * d_out for name, (_, d_out) in sizes.items())
        return kept

    def _inputs(self, d_in: dict[str, int]) -> int:
        """The inputs of A, which its gradient needs, and of int8 products."""
        a, by_int8 = self.precision.adapter, self._shared(frozenset(self.shape.linears()))
        by_int8 = by_int8 if self.quant is QuantType.int8 else 0
        if self.dropout:
            mask = 1 if self.on_gpu else a
            return by_int8 + sum((mask + a) * size for size in d_in.values())
        if self.dora and self.precision.autocast:
            return by_int8 + sum(a * size for name, size in d_in.items() if name != "o_proj")
        if self.reads_as_it_is():
            return by_int8 or self._shared(self.names)
        return by_int8 + sum(a * size for size in d_in.values())

    def reads_as_it_is(self) -> bool:
        """Whether A reads the block's own tensors: PEFT else casts a copy for every adapter."""
        if self.precision.autocast:
            return self.quant is not QuantType.none and self.precision.compute == self.precision.adapter
        return self.precision.compute == FP32

    def _shared(self, names: frozenset[str]) -> int:
        """Inputs of linear layers that nothing else keeps: q, k and v read the same one, gate and up too."""
        s, c = self.shape, self.precision.compute
        attention = s.hidden_size if names & {"q_proj", "k_proj", "v_proj"} else 0
        output = s.q_size if "o_proj" in names and self.attention is Attention.eager else 0
        mlp = s.hidden_size if names & {"gate_proj", "up_proj"} else 0
        return c * (attention + output + mlp + (s.intermediate_size if "down_proj" in names else 0))
