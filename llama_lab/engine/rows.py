"""Causal attention within rows that lie one behind the other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama_lab.engine.attention import MAX_LENGTH, Attend


@dataclass(kw_only=True)
class RowBounds:
    """Where rows begin and end."""

    starts: Tensor
    """(rows + 1,) int32 on the device: first places, and the end of the last; empty rows at the end do no harm."""
    longest: int
    """No row is longer."""
    spans: Sequence[tuple[int, int]]
    """The same on the host, for devices without a kernel for it."""


def attend(q: Tensor, k: Tensor, v: Tensor, rows: RowBounds, scale: float) -> Tensor:
    """``softmax(q kᵀ · scale) v`` of each row by itself.

    Args:
        q: (N, heads, head_dim).
        k, v: (N, kv_heads, head_dim).
    """
    if q.is_cuda:
        return _varlen(q, k, v, rows, scale)
    if rows.longest <= MAX_LENGTH:
        return Attend.apply(q, k, v, rows.spans, scale)
    return torch.cat([_one(q[a:b], k[a:b], v[a:b], scale) for a, b in rows.spans])


def _varlen(q: Tensor, k: Tensor, v: Tensor, rows: RowBounds, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    kwargs: dict[str, Any] = {"scale": scale, **_causal()}
    if "enable_gqa" in _parameters():
        kwargs["enable_gqa"] = q.shape[1] != k.shape[1]
    found: Any = varlen_attn(q, k, v, rows.starts, rows.starts, rows.longest, rows.longest, **kwargs)
    return found


@cache
def _parameters() -> set[str]:
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def _causal() -> dict[str, Any]:
    """torch 2.10 has a flag, later ones a window."""
    return {"is_causal": True} if "is_causal" in _parameters() else {"window_size": (-1, 0)}


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return found[0].transpose(0, 1)
