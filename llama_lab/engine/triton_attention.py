"""Attention within rows that lie one behind the other, on a GPU, by kernels of our own.

PyTorch's kernel for such rows (`varlen_attn`) has a program for every part of the longest row in every row, and for
every row that there could be; with short rows most of them find nothing to do. These take the stream tile by tile, and
write the gradients of q, k and v where the next product reads them. K adapters, N tokens of each adapter, H heads, E
numbers of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from llama_lab.engine import attention_kernels as kernels

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program of a kernel takes at once."""

    queries: int
    keys: int
    warps: int
    stages: int


ATTEND = Tile(queries=64, keys=64, warps=4, stages=3)
BACK_Q = Tile(queries=64, keys=32, warps=4, stages=3)
BACK_KV = Tile(queries=32, keys=64, warps=4, stages=3)
"""Chosen by measuring on an H100, for heads of 128 numbers in rows as long as a chat's, and in one of 8,192 tokens."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of each of all K x N places, where its row begins and ends, (K N,) int32; and how many places an adapter has."""

    first: Tensor
    last: Tensor
    num_tokens: int


def bounds_of(starts: Tensor, num_adapters: int, num_tokens: int) -> Bounds:
    """From the first places of all rows, and the end of the last, int32."""
    places = torch.arange(num_adapters * num_tokens, dtype=torch.int32, device=starts.device)
    behind = torch.searchsorted(starts, places, right=True)
    return Bounds(first=starts[behind - 1], last=starts[behind], num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What `attend_back` needs of the way there."""

    qkv_NHE: Tensor
    """The heads of q, k and v of all adapters; the last two dimensions are one piece."""
    num_kv: int
    scale: float
    """Of the scores."""
    out_NHE: Tensor
    lse_HN: Tensor
    """Logarithms to the base 2 of what shares were divided by."""


def attend(qkv_NHE: Tensor, num_kv: int, scale: float, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Attention of each row by itself, (K N, heads of q, E), and `Forward.lse_HN`."""
    q, k, v = _split(qkv_NHE, num_kv)
    num_q, size = q.shape[1:]
    out, lse = q.new_empty(q.shape), q.new_empty(num_q, len(q), dtype=torch.float32)
    kernels.attend_kernel[_grid(bounds, ATTEND.queries, num_q)](
        *(q, k, v, bounds.first, out, lse),
        *(scale * LOG2_E, bounds.num_tokens, q.stride(0), out.stride(0)),
        GROUP=num_q // num_kv,
        E=size,
        **_launched(ATTEND),
    )
    return out, lse


def attend_back(grad_NHE: Tensor, forward: Forward, bounds: Bounds, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Gradient of q, k and v from that of what `attend` gave; the first two turned, by `sin_NE` as `turn` takes it."""
    q, k, v = _split(forward.qkv_NHE, forward.num_kv)
    num_q, size = q.shape[1:]
    found, delta = torch.empty_like(forward.qkv_NHE), torch.empty_like(forward.lse_HN)
    grad_q, grad_k, grad_v = _split(found, forward.num_kv)
    numbers = (forward.scale * LOG2_E, forward.scale, bounds.num_tokens, q.stride(0), grad_NHE.stride(0))
    sizes = {"GROUP": num_q // forward.num_kv, "E": size}
    kernels.attend_back_q_kernel[_grid(bounds, BACK_Q.queries, num_q)](
        *(grad_NHE, q, k, v, bounds.first, cos_NE, sin_NE, forward.out_NHE, forward.lse_HN, delta, grad_q),
        *numbers,
        **sizes,
        **_launched(BACK_Q),
    )
    kernels.attend_back_kv_kernel[_grid(bounds, BACK_KV.keys, forward.num_kv)](
        *(grad_NHE, q, k, v, bounds.first, bounds.last, cos_NE, sin_NE, forward.lse_HN, delta, grad_k, grad_v),
        *numbers,
        **sizes,
        **_launched(BACK_KV),
    )
    return found


def _split(qkv_NHE: Tensor, num_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_NHE.split([qkv_NHE.shape[1] - 2 * num_kv, num_kv, num_kv], dim=1)
    return q, k, v


def _grid(bounds: Bounds, tile: int, num_heads: int) -> tuple[int, int, int]:
    return triton.cdiv(bounds.num_tokens, tile), num_heads, len(bounds.first) // bounds.num_tokens


def _launched(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
