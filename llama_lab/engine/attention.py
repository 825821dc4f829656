"""Causal attention within short rows that lie one behind the other, without the products between rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_LENGTH = 256
"""Rows up to this length: beyond it the scores that are kept for backward cost more than they save."""


class Attend(torch.autograd.Function):
    """``softmax(q kᵀ · scale) v`` of each row by itself, the heads of one key in one product (arXiv 2305.13245)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[tuple[int, int]], scale: float) -> Tensor:
        """
        Args:
            q: (N, heads, head_dim).
            k, v: (N, kv_heads, head_dim).
            rows: first and last place but one of each row; together they are all N places.
        Returns:
            (N, heads, head_dim).
        """
        out, kept = torch.empty_like(q), []
        num_kv = k.shape[1]
        for start, end in rows:
            length = end - start
            q_row, k_row, v_row = (
                _grouped(q[start:end], num_kv),
                k[start:end].transpose(0, 1),
                v[start:end].transpose(0, 1),
            )
            scores = q_row.bmm(k_row.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
            per_query = scores.view(num_kv, length, -1, length)
            per_query.masked_fill_(_future(length, q.device), float("-inf"))
            shares = scores.softmax(dim=-1).to(q.dtype)
            out[start:end] = _ungrouped(shares.bmm(v_row), length)
            kept += [q_row, k_row, v_row, shares]
        ctx.save_for_backward(*kept)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        kept = ctx.saved_tensors
        num_kv, dim = kept[1].shape[0], grad.shape[-1]
        grad_q, grad_k, grad_v = torch.empty_like(grad), *(grad.new_empty(len(grad), num_kv, dim) for _ in "kv")
        for i, (start, end) in enumerate(ctx.rows):
            q, k, v, shares = kept[4 * i : 4 * i + 4]
            g = _grouped(grad[start:end], num_kv)
            g_shares = g.bmm(v.transpose(1, 2))
            g_scores = torch._softmax_backward_data(g_shares, shares, -1, shares.dtype).mul_(ctx.scale)
            grad_q[start:end] = _ungrouped(g_scores.bmm(k), end - start)
            grad_k[start:end] = g_scores.transpose(1, 2).bmm(q).transpose(0, 1)
            grad_v[start:end] = shares.transpose(1, 2).bmm(g).transpose(0, 1)
        return grad_q, grad_k, grad_v, None, None


def _grouped(x: Tensor, num_kv: int) -> Tensor:
    """(T, heads, dim) to (kv_heads, T · heads a key, dim)."""
    length, _, dim = x.shape
    return x.view(length, num_kv, -1, dim).transpose(0, 1).reshape(num_kv, -1, dim)


def _ungrouped(x: Tensor, length: int) -> Tensor:
    """(kv_heads, T · heads a key, dim) to (T, heads, dim)."""
    return x.view(x.shape[0], length, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)


def _future(length: int, device: torch.device) -> Tensor:
    """(T, 1, T): which places come after the one that looks."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)[:, None]
