"""The element-wise kernels for a GPU. Imported only where there is one: torch brings Triton along there alone.

K adapters, N tokens of each, I intermediate size, H heads, E numbers of a head, S numbers of an adapter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_lab.engine.lora_kernels import gate_of, through_gate
from llama_lab.engine.optimizer import BETAS, EPS, TILE, Used

COLUMNS = 1024
"""Numbers that a program takes at once."""


def gate(gate_up: Tensor) -> Tensor:
    """(..., I). Written here, since the compiler's takes long where it must divide by a number it does not know."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _gate[(out.numel() // width, triton.cdiv(width, COLUMNS))](gate_up, out, WIDTH=width, COLUMNS=COLUMNS, num_warps=4)
    return out


def gate_back(grad_KNI: Tensor, gate_up: Tensor) -> Tensor:
    """Both halves at once."""
    out, width = torch.empty_like(gate_up), grad_KNI.shape[-1]
    grid = (grad_KNI.numel() // width, triton.cdiv(width, COLUMNS))
    _gate_back[grid](grad_KNI, gate_up, out, WIDTH=width, COLUMNS=COLUMNS, num_warps=4)
    return out


def turn(qkv_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, num_turned: int) -> None:
    """In place: each program reads both halves of its heads before it writes."""
    num_tokens, num_heads, size = qkv_NHE.shape
    heads = _heads(size)
    _turn[(num_tokens, triton.cdiv(num_turned, heads))](
        qkv_NHE, cos_NE, sin_NE, num_turned, num_heads * size, HALF=size // 2, WIDE=_wide(size), HEADS=heads
    )


def adamw(buffers: Sequence[Tensor], work_KS: Tensor, grad_KS: Tensor, factors_KF: Tensor, used: Used | None) -> None:
    """As engine/optimizer.py; numbers beyond the rank of their adapter stay 0 and are not read."""
    master_KS, m_KS, v_KS, norm_K1 = buffers
    num_adapters, size = master_KS.shape
    padding = (master_KS,) * 3 if used is None else (used.rank_S, used.least_T, used.rank_K)
    # adapters run beside each other, so that all but one find what is padding in the cache
    _adamw[(num_adapters * triton.cdiv(size, TILE),)](
        master_KS,
        m_KS,
        v_KS,
        norm_K1,
        work_KS,
        grad_KS,
        factors_KF,
        *padding,
        num_adapters,
        size,
        master_KS.stride(0),
        factors_KF.stride(0),
        USED=used is not None,
        BETA_1=BETAS[0],
        BETA_2=BETAS[1],
        EPS=EPS,
        TILE=TILE,
        num_warps=8,
    )


def _heads(size: int) -> int:
    """Heads that a program takes at once."""
    return triton.next_power_of_2(max(1, COLUMNS // size))


def _wide(size: int) -> int:
    return triton.next_power_of_2(size // 2)


@triton.jit
def _gate(gate_up, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + i, gate_of(gate, up), mask=inside)


@triton.jit
def _gate_back(grad, gate_up, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < WIDTH
    g = tl.load(grad + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    of_gate, of_up = through_gate(g, gate, up)
    tl.store(out + row * 2 * WIDTH + i, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * WIDTH + WIDTH + i, of_up.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn(qkv, cos, sin, num_turned, row_stride, HALF: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr):
    n, e = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (h < num_turned)[:, None] & (e < HALF)[None, :]
    at = qkv + n * row_stride + h[:, None] * (2 * HALF) + e[None, :]
    low, high = tl.load(at, mask=mask).to(tl.float32), tl.load(at + HALF, mask=mask).to(tl.float32)
    angle, inside = n * (2 * HALF) + e, e < HALF
    cos_low, cos_high = _row(cos + angle, inside), _row(cos + angle + HALF, inside)
    sin_low, sin_high = _row(sin + angle, inside), _row(sin + angle + HALF, inside)
    tl.store(at, (low * cos_low + high * sin_low).to(qkv.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (high * cos_high + low * sin_high).to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def _row(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_adapters"])
def _adamw(
    master,
    m,
    v,
    norm,
    work,
    grad,
    factors,
    rank_of,
    least,
    ranks,
    num_adapters,
    size,
    stride,
    factors_stride,
    USED: tl.constexpr,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `adamw` of engine/optimizer.py."""
    k, tile = (tl.program_id(0) % num_adapters).to(tl.int64), tl.program_id(0) // num_adapters
    mine = factors + k * factors_stride
    steps = tl.load(mine + 1) > 0
    if USED:
        steps = steps & (tl.load(least + tile) < tl.load(ranks + k))
    if steps:
        j = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        mask = j < size
        if USED:
            mask = mask & (tl.load(rank_of + j, mask=mask, other=0) < tl.load(ranks + k))
        at = k * stride + j
        keep, rate, root, max_norm = tl.load(mine + 2), tl.load(mine + 3), tl.load(mine + 4), tl.load(mine + 5)
        found = tl.load(norm + k)
        # not min(): what is not finite must not become a number
        by = tl.where(max_norm / (found + 1e-6) > 1, 1.0, max_norm / (found + 1e-6))
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * by
        new_m, new_v = tl.load(m + at, mask=mask, other=0.0), tl.load(v + at, mask=mask, other=0.0)
        new_m += (g - new_m) * (1 - BETA_1)
        new_v = new_v * BETA_2 + (1 - BETA_2) * g * g
        new = tl.load(master + at, mask=mask, other=0.0) * keep + rate * new_m / (tl.sqrt(new_v) * root + EPS)
        tl.store(m + at, new_m, mask=mask)
        tl.store(v + at, new_v, mask=mask)
        tl.store(master + at, new, mask=mask)
        tl.store(work + at, new.to(work.dtype.element_ty), mask=mask)
