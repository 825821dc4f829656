"""How the frozen base is stored: bitsandbytes' 4-bit and 8-bit types."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.choices import ComputeDtype, QuantType
from llama_lab.config import QuantSettings

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

DTYPES = {
    ComputeDtype.bfloat16: torch.bfloat16,
    ComputeDtype.float16: torch.float16,
    ComputeDtype.float32: torch.float32,
}
FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""CPU features without which bf16 products are slower than fp32 ones."""


def compute_dtype(quant: QuantSettings) -> tuple[torch.dtype, str]:
    """The type of activations, and why it was chosen."""
    if quant.compute_dtype is not ComputeDtype.auto:
        return DTYPES[quant.compute_dtype], "asked for"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bf16"
        return torch.float16, "this GPU has no bf16"
    if _cpu_flags() & FAST_BF16_FLAGS:
        return torch.bfloat16, "this CPU computes in bf16"
    return torch.float32, "this CPU has no fast bf16"


def quantization_config(
    quant: QuantSettings, dtype: torch.dtype, whole: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """What transformers is told to load the base with; None leaves the weights as they are.

    Args:
        whole: modules that stay as they are; None leaves out the head of a language model.
    """
    from transformers import BitsAndBytesConfig

    if quant.type is QuantType.none:
        return None
    if quant.type is QuantType.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type=str(quant.type),
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(base: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight at its first forward in eval mode, for good, and
    the product with a repacked weight has no backward: a model that was measured before training would then train on
    wrong gradients without an error. Test: tests/integration/test_learning.py.
    """
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantise_once(base: PreTrainedModel) -> bool:
    """On a CPU, keep each 4-bit weight beside itself as the numbers it stands for; whether it was done.

    The products are those of bitsandbytes, which dequantises at every call (tests/integration/test_learning.py), and an
    answer comes several times faster. It is done where the copies take at most a quarter of the free memory.
    """
    import psutil
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers: list[Any] = [m for m in base.modules() if isinstance(m, Linear4bit) and m.weight.device.type == "cpu"]
    num_bytes = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)
    if not layers or num_bytes > psutil.virtual_memory().available / 4:
        return False
    for layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        layer.dense_weight = weight  # engine/install.py multiplies with it, too
        layer.forward = partial(_dense_forward, layer)
    return True


def _dense_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = layer.dense_weight
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
