"""Bytes that stay in memory for the whole of a training: the frozen base and the optimizer's states."""

from __future__ import annotations

from llama_lab.activations import FP32, Device, Precision
from llama_lab.choices import Optimizer, QuantType
from llama_lab.config import QuantSettings
from llama_lab.params import ModelShape

BLOCK = 64
"""Weights that share one quantisation constant: bitsandbytes' block size of 4-bit types."""
OUTER_BLOCK = 256
"""Constants that share one of the second level; also numbers of an 8-bit optimizer state that share a scale."""
PAGED_FROM = 100_000
"""Elements from which on a tensor's optimizer state is paged (bitsandbytes/optim/optimizer.py)."""
EIGHT_BIT_FROM = 4096
"""Elements from which on a tensor's optimizer state is 8-bit (same place)."""
STATES = {Optimizer.adafactor: 0.0, Optimizer.sgd: 0.0, Optimizer.lion_32bit: 1.0, Optimizer.lion_8bit: 1.0}
"""Optimizer states a parameter; two for Adam. Adafactor's are sums over rows and columns: next to nothing."""


def base_bytes(shape: ModelShape, quant: QuantSettings, types: Precision, device: Device) -> float:
    """Bytes of the frozen base; embedding, lm_head and norms are never quantised."""
    c, params = types.compute, shape.num_linear_params()
    other = c * shape.num_other_params()
    if quant.type is QuantType.none:
        return other + c * params
    if quant.type is QuantType.int8:
        rows = shape.num_layers * sum(d_out for _, d_out in shape.linears().values())
        return other + params + FP32 * rows
    constants = params / BLOCK * (1 + FP32 / OUTER_BLOCK if quant.double_quant else FP32)
    copies = c * params if device is Device.cpu else 0  # quant.dequantise_once
    return other + params / 2 + constants + copies


def optimizer_bytes(tensors: list[int], optim: Optimizer, device: Device) -> float:
    """Bytes of the optimizer's states that stay on the device."""
    paged = "paged" in optim and device is not Device.cpu
    resident = [size for size in tensors if not paged or size < PAGED_FROM]

    def state(size: int) -> float:
        return size + FP32 * size / OUTER_BLOCK if "8bit" in optim and size >= EIGHT_BIT_FROM else FP32 * size

    return STATES.get(optim, 2.0) * sum(map(state, resident))
