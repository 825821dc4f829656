"""The kernels of kernels.py for a GPU. Imported only where there is one: torch brings Triton along there alone."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, INPUTS, RANKS = 64, 128, 64
"""Sizes of a tile of `add_thinned`; larger ranks are summed up in parts."""
COLUMNS = 1024
"""Numbers that a program of `gate_back` takes at once."""


def add_thinned(grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> None:
    """In place: the gradient is read and written once, whatever the number of layers."""
    num_adapters, num_tokens, width = grad_KND.shape
    num_layers, rank = low_KPNR.shape[1], low_KPNR.shape[3]
    grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(width, INPUTS), num_adapters)
    _add_thinned[grid](
        grad_KND,
        low_KPNR,
        a_KPRD,
        keys_KPW,
        num_tokens,
        a_KPRD.stride(0),
        keys_KPW.stride(0),
        keys_KPW.stride(1),
        P=num_layers,
        R=rank,
        D=width,
        TOKENS=TOKENS,
        INPUTS=INPUTS,
        RANKS=max(16, min(RANKS, triton.next_power_of_2(rank))),
        num_warps=4,
    )


def gate_back(grad_KNI: Tensor, gate_up: Tensor) -> Tensor:
    """Both halves at once."""
    out, width = torch.empty_like(gate_up), grad_KNI.shape[-1]
    grid = (grad_KNI.numel() // width, triton.cdiv(width, COLUMNS))
    _gate_back[grid](grad_KNI, gate_up, out, WIDTH=width, COLUMNS=COLUMNS, num_warps=4)
    return out


@triton.jit
def _add_thinned(
    grad,
    low,
    a,
    keys,
    num_tokens,
    a_stride,
    keys_stride_k,
    keys_stride_p,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    k = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    inside = (n < num_tokens)[:, None] & (d < D)[None, :]
    place = n[:, None] * D + d[None, :]
    at = grad + k * num_tokens * D + place
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(P):
        through = tl.zeros((TOKENS, INPUTS), dtype=tl.float32)
        for first in tl.static_range(0, R, RANKS):
            r = first + tl.arange(0, RANKS)
            low_at = low + ((k * P + i) * num_tokens + n[:, None]) * R + r[None, :]
            low_tile = tl.load(low_at, mask=(n < num_tokens)[:, None] & (r < R)[None, :], other=0.0)
            a_at = a + k * a_stride + (i * R + r[:, None]) * D + d[None, :]
            a_tile = tl.load(a_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
            through = tl.dot(low_tile, a_tile, through, input_precision="ieee")
        key = keys + k * keys_stride_k + i * keys_stride_p
        # as engine/dropout.py hashes
        h = (place + tl.load(key)) * 0x7FEB352D
        h = ((h ^ ((h >> 16) & 0xFFFF)) ^ tl.load(key + 1)) * (0x846CA68B - 2**32)
        factor = tl.load(key + 3).to(tl.float32, bitcast=True)
        total += tl.where(h >= tl.load(key + 2), through * factor, 0.0)
    tl.store(at, total.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _gate_back(grad, gate_up, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < WIDTH
    g = tl.load(grad + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    of_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = g * gate * sigmoid
    tl.store(out + row * 2 * WIDTH + i, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * WIDTH + WIDTH + i, of_up.to(out.dtype.element_ty), mask=inside)
