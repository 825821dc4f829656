"""Rotation of queries and keys, and causal attention within rows, forward and backward.

K adapters, N tokens of all of them here, H heads of queries, keys and values, E numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_lab.engine.kernels import swapped, turn
from llama_lab.engine.rows import RowBounds, attend

if TYPE_CHECKING:
    from llama_lab.engine.triton_attention import Bounds

MEASURED = (9, 0)
"""Compute capability of the cards on which our own kernels were measured; others keep PyTorch's."""
LEAST_SIZE, MOST_SIZE = 16, 128
"""Of a head, for our own kernels, which take powers of 2."""


@dataclass(kw_only=True)
class Places:
    """Of a micro-batch: where rows begin and end, and by what queries and keys are turned."""

    rows: RowBounds
    cos_NE: Tensor
    sin_NE: Tensor
    """As `turn` takes it."""
    back_sin_NE: Tensor
    """The same for the way back."""
    bounds: Bounds | None
    """For our own kernels, where these compute it."""


def places_of(rows: RowBounds, cos_NE: Tensor, sin_NE: Tensor, num_adapters: int) -> Places:
    """From the angles that transformers gives."""
    half, bounds = sin_NE.shape[-1] // 2, None
    sin_NE = torch.cat([-sin_NE[:, :half], sin_NE[:, half:]], dim=-1)
    if _is_for_own_kernels(cos_NE):
        from llama_lab.engine.triton_attention import bounds_of

        bounds = bounds_of(rows.starts, num_adapters, len(cos_NE) // num_adapters)
    return Places(
        rows=rows, cos_NE=cos_NE, sin_NE=sin_NE, back_sin_NE=swapped(sin_NE[:, None])[:, 0].contiguous(), bounds=bounds
    )


@dataclass(kw_only=True)
class Attended:
    """What attention gives, (N, heads of queries, E), and the way back: from its gradient to that of `qkv_NHE`."""

    out: Tensor
    back: Callable[[Tensor], Tensor]


def attend_turned(qkv_NHE: Tensor, num_kv: int, scale: float, places: Places) -> Attended:
    """Turn queries and keys in place, and attend in each row by itself.

    Args:
        num_kv: heads of keys; as many of values.
        scale: of the scores.
    """
    turn(qkv_NHE, places.cos_NE, places.sin_NE, qkv_NHE.shape[1] - num_kv)
    if places.bounds is not None:
        return _by_own_kernels(qkv_NHE, num_kv, scale, places, places.bounds)
    sizes = [qkv_NHE.shape[1] - 2 * num_kv, num_kv, num_kv]
    with torch.enable_grad():
        q, k, v = (part.detach().requires_grad_() for part in qkv_NHE.split(sizes, dim=1))
        out = attend(q, k, v, places.rows, scale)

    def back(grad_NHE: Tensor) -> Tensor:
        found = torch.cat(torch.autograd.grad(out, (q, k, v), grad_NHE), dim=1)
        turn(found, places.cos_NE, places.back_sin_NE, sizes[0] + num_kv)
        return found

    return Attended(out=out.detach(), back=back)


def _by_own_kernels(qkv_NHE: Tensor, num_kv: int, scale: float, places: Places, bounds: Bounds) -> Attended:
    from llama_lab.engine import triton_attention

    out, lse_HN = triton_attention.attend(qkv_NHE, num_kv, scale, bounds)

    def back(grad_NHE: Tensor) -> Tensor:
        forward = triton_attention.Forward(qkv_NHE=qkv_NHE, out_NHE=out, lse_HN=lse_HN, num_kv=num_kv, scale=scale)
        return triton_attention.attend_back(grad_NHE, forward, bounds, places.cos_NE, places.back_sin_NE)

    return Attended(out=out, back=back)


def _is_for_own_kernels(like_NE: Tensor) -> bool:
    size = like_NE.shape[-1]
    return (
        like_NE.is_cuda
        and like_NE.dtype is torch.bfloat16
        and torch.cuda.get_device_capability(like_NE.device) == MEASURED
        and size.bit_count() == 1
        and LEAST_SIZE <= size <= MOST_SIZE
    )
