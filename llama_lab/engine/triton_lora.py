"""LoRA's own products on a GPU, with dropout inside: what it leaves of an input is computed where it is read.

As kernels.py says it in plain operations. K adapters, P adapted layers of a projection, W words of a dropout key,
N tokens of each adapter, R rank, D inputs, O outputs of a layer. Sums over many numbers are cut into parts, each a
program, and added up in an order that never changes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_lab.engine.entering import Entering, Gated, Normed

LOW_TILE, GRAD_A_TILE, GATED_TILE, ADD_TILE = (32, 128), (64, 64), (32, 64), (32, 64)
"""Tokens and inputs that a program takes at once, of the kernels with these names; all four and the next were chosen by
measuring on an H100, for a Llama-2-7B at ranks 16 and 64."""
BACK_TILE = (128, 256)
"""Tokens and outputs."""
MAX_RANKS = 64
"""Larger ranks are taken in chunks."""
PROGRAMS, MAX_PARTS = 264, 16
"""Programs that keep a GPU busy: two for each of an H100's 132 multiprocessors; and the most parts of a sum."""
COLUMNS = 1024
"""Numbers that a program of `_added_up` takes at once."""
PLAIN, NORMED, GATED = 0, 1, 2
"""What `_thinned_grad_a` reads."""


def thinned_low(x_KND: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> Tensor:
    """``A dropout(x)`` of each layer, (K, P, N, R)."""
    (num_adapters, num_tokens, width), (num_layers, rank) = x_KND.shape, a_KPRD.shape[1:3]
    ranks = _tile_of(rank)
    jobs, tiles = num_layers * triton.cdiv(rank, ranks), triton.cdiv(num_tokens, LOW_TILE[0])
    num_parts = _num_parts(jobs * tiles * num_adapters, triton.cdiv(width, LOW_TILE[1]))
    out = x_KND.new_empty(num_adapters, num_layers, num_tokens, rank)
    parts = _parts_of(out, num_parts)
    _thinned_low[(jobs, tiles, num_adapters * num_parts)](
        x_KND,
        a_KPRD,
        keys_KPW,
        parts,
        num_tokens,
        a_KPRD.stride(0),
        keys_KPW.stride(0),
        keys_KPW.stride(1),
        P=num_layers,
        R=rank,
        D=width,
        PARTS=num_parts,
        TOKENS=LOW_TILE[0],
        INPUTS=LOW_TILE[1],
        RANKS=ranks,
        num_warps=4,
        num_stages=3,
    )
    return _added(parts, out)


def thinned_grad_a(entering: Entering, low_KPNR: Tensor, keys_KPW: Tensor, out_KPRD: Tensor) -> None:
    """Gradient of each A, from that of its output and from what entered the projection."""
    source, x, weight, rstd = _unpacked(entering)
    (num_adapters, num_layers, num_tokens, rank), width = low_KPNR.shape, out_KPRD.shape[3]
    tokens, inputs = GATED_TILE if source == GATED else GRAD_A_TILE
    ranks = _tile_of(rank)
    jobs, tiles = num_layers * triton.cdiv(rank, ranks), triton.cdiv(width, inputs)
    num_parts = _num_parts(jobs * tiles * num_adapters, triton.cdiv(num_tokens, tokens))
    parts = _parts_of(out_KPRD, num_parts)
    _thinned_grad_a[(jobs, tiles, num_adapters * num_parts)](
        low_KPNR,
        x,
        weight,
        rstd,
        keys_KPW,
        parts,
        num_tokens,
        parts.stride(1) if num_parts > 1 else out_KPRD.stride(0),
        keys_KPW.stride(0),
        keys_KPW.stride(1),
        P=num_layers,
        R=rank,
        D=width,
        SOURCE=source,
        PARTS=num_parts,
        TOKENS=tokens,
        INPUTS=inputs,
        RANKS=ranks,
        num_warps=4,
        num_stages=3,
    )
    _added(parts, out_KPRD)


def add_thinned(grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> None:
    """In place: the gradient is read and written once, whatever the number of layers."""
    _add_thinned_to(grad_KND, low_KPNR, a_KPRD, keys_KPW, None, grad_KND)


def gate_back_thinned(grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor, gate_up: Tensor) -> Tensor:
    """`add_thinned`, and back through the gate at once."""
    out = torch.empty_like(gate_up)
    _add_thinned_to(grad_KND, low_KPNR, a_KPRD, keys_KPW, gate_up, out)
    return out


def _add_thinned_to(
    grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor, gate_up: Tensor | None, out: Tensor
) -> None:
    num_adapters, num_tokens, width = grad_KND.shape
    num_layers, rank = low_KPNR.shape[1], low_KPNR.shape[3]
    grid = (triton.cdiv(num_tokens, ADD_TILE[0]), triton.cdiv(width, ADD_TILE[1]), num_adapters)
    _add_thinned[grid](
        grad_KND,
        low_KPNR,
        a_KPRD,
        keys_KPW,
        out if gate_up is None else gate_up,
        out,
        num_tokens,
        a_KPRD.stride(0),
        keys_KPW.stride(0),
        keys_KPW.stride(1),
        P=num_layers,
        R=rank,
        D=width,
        GATED=gate_up is not None,
        TOKENS=ADD_TILE[0],
        INPUTS=ADD_TILE[1],
        RANKS=_tile_of(rank),
        num_warps=4,
    )


def back_low(
    grad_KNO: Tensor, places: Sequence[slice], low_KPNR: Tensor, b_KOR: Sequence[Tensor], out_KOR: Sequence[Tensor]
) -> Tensor:
    """Gradients of each B into `out`, and of the low-rank products, returned; that of the outputs is read once.

    Layers of one size that lie evenly, as those of a projection mostly do, go at once.
    """
    grad_low = torch.empty_like(low_KPNR, memory_format=torch.contiguous_format)
    b, out = _joined(b_KOR), _joined(out_KOR)
    step = _even_step(places)
    if b is not None and out is not None and step is not None:
        _back_low_of(grad_KNO[..., places[0].start :], step, low_KPNR, b, out, grad_low)
        return grad_low
    for i, place in enumerate(places):
        part = slice(i, i + 1)
        _back_low_of(
            grad_KNO[..., place.start :],
            0,
            low_KPNR[:, part],
            b_KOR[i][:, None],
            out_KOR[i][:, None],
            grad_low[:, part],
        )
    return grad_low


def _back_low_of(
    grad_KNO: Tensor, step: int, low_KPNR: Tensor, b_KPOR: Tensor, out_KPOR: Tensor, grad_low_KPNR: Tensor
) -> None:
    num_adapters, num_layers, num_outputs, rank = b_KPOR.shape
    num_tokens, tiles = low_KPNR.shape[2], triton.cdiv(num_outputs, BACK_TILE[1])
    num_parts = _num_parts(tiles * num_layers * num_adapters, triton.cdiv(num_tokens, BACK_TILE[0]))
    parts, low_parts = _parts_of(out_KPOR, num_parts), _parts_of(grad_low_KPNR, tiles)
    _back_low[(tiles * num_layers, num_parts, num_adapters)](
        grad_KNO,
        low_KPNR,
        b_KPOR,
        parts,
        low_parts,
        num_tokens,
        *(grad_KNO.stride(0), grad_KNO.stride(1), step),
        *low_KPNR.stride()[:3],
        *(b_KPOR.stride(0), parts.stride(-4), low_parts.stride(-4)),
        P=num_layers,
        SIZE=num_outputs,
        R=rank,
        PARTS=num_parts,
        TOKENS=BACK_TILE[0],
        OUTPUTS=BACK_TILE[1],
        RANKS=_tile_of(rank),
        num_warps=8,
    )
    _added(parts, out_KPOR)
    _added(low_parts, grad_low_KPNR)


def _joined(matrices_KOR: Sequence[Tensor]) -> Tensor | None:
    """(K, P, O, R) of matrices that lie one behind the other without gaps; None where they do not."""
    first, size = matrices_KOR[0], matrices_KOR[0][0].numel()
    for i, matrix in enumerate(matrices_KOR):
        if matrix.shape != first.shape or matrix.storage_offset() != first.storage_offset() + i * size:
            return None
    num_adapters, num_outputs, rank = first.shape
    shape, stride = (num_adapters, len(matrices_KOR), num_outputs, rank), (first.stride(0), size, rank, 1)
    return first.as_strided(shape, stride)


def _even_step(places: Sequence[slice]) -> int | None:
    """From one layer's outputs to the next one's; None where that differs."""
    steps = {after.start - before.start for before, after in pairwise(places)}
    return None if len(steps) > 1 else steps.pop() if steps else 0


def _unpacked(entering: Entering) -> tuple[int, Tensor, Tensor, Tensor]:
    if isinstance(entering, Normed):
        return NORMED, entering.x, entering.weight, entering.rstd
    if isinstance(entering, Gated):
        return GATED, entering.gate_up, entering.gate_up, entering.gate_up
    return PLAIN, entering.x, entering.x, entering.x


def _tile_of(rank: int) -> int:
    return max(16, min(MAX_RANKS, triton.next_power_of_2(rank)))


def _num_parts(num_programs: int, num_tiles: int) -> int:
    """Into how many parts a sum over so many tiles is cut; a part has two tiles at least."""
    return max(1, min(MAX_PARTS, triton.cdiv(PROGRAMS, num_programs), num_tiles // 2))


def _parts_of(out: Tensor, num_parts: int) -> Tensor:
    """Where the parts of `out` are written: itself if there is one."""
    return out if num_parts == 1 else out.new_empty(num_parts, *out.shape, dtype=torch.float32)


def _added(parts: Tensor, out: Tensor) -> Tensor:
    """`out`, with the parts added up in it; its adapters may lie apart, each is in one piece."""
    if parts is not out:
        num_adapters, size = out.shape[0], out[0].numel()
        grid = (triton.cdiv(size, COLUMNS), num_adapters)
        _added_up[grid](parts, out, size, out.stride(0), PARTS=parts.shape[0], COLUMNS=COLUMNS, num_warps=4)
    return out


@triton.jit
def _thinned(x, place, key):
    """As engine/dropout.py."""
    h = (place + tl.load(key)) * 0x7FEB352D
    h = ((h ^ ((h >> 16) & 0xFFFF)) ^ tl.load(key + 1)) * (0x846CA68B - 2**32)
    factor = tl.load(key + 3).to(tl.float32, bitcast=True)
    return tl.where(h >= tl.load(key + 2), x.to(tl.float32) * factor, 0.0)


@triton.jit
def _thinned_low(
    x,
    a,
    keys,
    out,
    num_tokens,
    a_stride,
    keys_stride_k,
    keys_stride_p,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    # layers that read the same input run beside each other, so that all but one find it in the cache
    i, first_rank = tl.program_id(0) % P, tl.program_id(0) // P * RANKS
    part, num_adapters = tl.program_id(2) % PARTS, tl.num_programs(2) // PARTS
    k = (tl.program_id(2) // PARTS).to(tl.int64)
    n, r = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), first_rank + tl.arange(0, RANKS)
    key, x_at, a_at = keys + k * keys_stride_k + i * keys_stride_p, x + k * num_tokens * D, a + k * a_stride
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    num_tiles = tl.cdiv(D, INPUTS)
    for tile in range(part * num_tiles // PARTS, (part + 1) * num_tiles // PARTS):
        d = tile * INPUTS + tl.arange(0, INPUTS)
        place = n[:, None] * D + d[None, :]
        x_tile = tl.load(x_at + place, mask=(n < num_tokens)[:, None] & (d < D)[None, :], other=0.0)
        a_tile = tl.load(
            a_at + (i * R + r[None, :]) * D + d[:, None], mask=(r < R)[None, :] & (d < D)[:, None], other=0.0
        )
        total = tl.dot(_thinned(x_tile, place, key).to(a_tile.dtype), a_tile, total, input_precision="ieee")
    place = ((part * num_adapters + k) * P + i) * num_tokens
    mask = (n < num_tokens)[:, None] & (r < R)[None, :]
    tl.store(out + (place + n[:, None]) * R + r[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _entering(x, weight, rstd, n, d, num_tokens, D: tl.constexpr, SOURCE: tl.constexpr):
    """What entered a projection, rounded as it was then."""
    inside = (n < num_tokens)[:, None] & (d < D)[None, :]
    if SOURCE == 2:
        at = x + n[:, None] * (2 * D) + d[None, :]
        gate = tl.load(at, mask=inside, other=0.0)
        up = tl.load(at + D, mask=inside, other=0.0).to(tl.float32)
        wide = gate.to(tl.float32)
        return (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype)
    x_tile = tl.load(x + n[:, None] * D + d[None, :], mask=inside, other=0.0)
    if SOURCE == 1:
        by = tl.load(rstd + n, mask=n < num_tokens, other=0.0)
        wide = x_tile.to(tl.float32) * by[:, None] * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        return wide.to(x_tile.dtype)
    return x_tile


@triton.jit
def _thinned_grad_a(
    low,
    x,
    weight,
    rstd,
    keys,
    out,
    num_tokens,
    out_stride,
    keys_stride_k,
    keys_stride_p,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    SOURCE: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    i, first_rank = tl.program_id(0) % P, tl.program_id(0) // P * RANKS
    part, num_adapters = tl.program_id(2) % PARTS, tl.num_programs(2) // PARTS
    k = (tl.program_id(2) // PARTS).to(tl.int64)
    d, r = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS), first_rank + tl.arange(0, RANKS)
    key, low_at = keys + k * keys_stride_k + i * keys_stride_p, low + (k * P + i) * num_tokens * R
    x_at = x + k * num_tokens * (2 * D if SOURCE == 2 else D)
    total = tl.zeros((RANKS, INPUTS), dtype=tl.float32)
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    for tile in range(part * num_tiles // PARTS, (part + 1) * num_tiles // PARTS):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        low_mask = (r < R)[:, None] & (n < num_tokens)[None, :]
        low_tile = tl.load(low_at + n[None, :] * R + r[:, None], mask=low_mask, other=0.0)
        x_tile = _entering(x_at, weight, rstd + k * num_tokens, n, d, num_tokens, D, SOURCE)
        x_tile = _thinned(x_tile, n[:, None] * D + d[None, :], key).to(low_tile.dtype)
        total = tl.dot(low_tile, x_tile, total, input_precision="ieee")
    at = out + (part * num_adapters + k) * out_stride + (i * R + r[:, None]) * D + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(r < R)[:, None] & (d < D)[None, :])


@triton.jit
def _add_thinned(
    grad,
    low,
    a,
    keys,
    gate_up,
    out,
    num_tokens,
    a_stride,
    keys_stride_k,
    keys_stride_p,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    k = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    inside = (n < num_tokens)[:, None] & (d < D)[None, :]
    place = n[:, None] * D + d[None, :]
    total = tl.load(grad + k * num_tokens * D + place, mask=inside, other=0.0).to(tl.float32)
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
        total += _thinned(through, place, key)
    if GATED:
        at = k * num_tokens * (2 * D) + n[:, None] * (2 * D) + d[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + D, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        of_gate = total * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(out + at, of_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + D, (total * gate * sigmoid).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + k * num_tokens * D + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _back_low(
    grad,
    low,
    b,
    out,
    low_out,
    num_tokens,
    grad_k,
    grad_n,
    step,
    low_k,
    low_p,
    low_n,
    b_k,
    out_k,
    low_out_k,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    num_o: tl.constexpr = tl.cdiv(SIZE, OUTPUTS)
    o_tile, i, part = tl.program_id(0) % num_o, tl.program_id(0) // num_o, tl.program_id(1)
    k, num_adapters = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o, r = o_tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, RANKS)
    b_mask, b_place = (o < SIZE)[:, None] & (r < R)[None, :], (i * SIZE + o[:, None]) * R + r[None, :]
    b_tile = tl.load(b + k * b_k + b_place, mask=b_mask, other=0.0)
    total = tl.zeros((OUTPUTS, RANKS), dtype=tl.float32)
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    for tile in range(part * num_tiles // PARTS, (part + 1) * num_tiles // PARTS):
        n = tile * TOKENS + tl.arange(0, TOKENS)
        n_mask = (n < num_tokens)[:, None]
        grad_at = grad + k * grad_k + n[:, None] * grad_n + i * step + o[None, :]
        grad_tile = tl.load(grad_at, mask=n_mask & (o < SIZE)[None, :], other=0.0)
        low_at = low + k * low_k + i * low_p + n[:, None] * low_n + r[None, :]
        low_tile = tl.load(low_at, mask=n_mask & (r < R)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad_tile), low_tile, total, input_precision="ieee")
        of_low = tl.dot(grad_tile, b_tile, input_precision="ieee")
        at = low_out + (o_tile * num_adapters + k) * low_out_k + (i * num_tokens + n[:, None]) * R + r[None, :]
        tl.store(at, of_low.to(low_out.dtype.element_ty), mask=n_mask & (r < R)[None, :])
    tl.store(out + (part * num_adapters + k) * out_k + b_place, total.to(out.dtype.element_ty), mask=b_mask)


@triton.jit
def _added_up(parts, out, size, out_stride, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    j, k, num_adapters = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for part in range(PARTS):
        at = parts + (part * num_adapters + k).to(tl.int64) * size + j
        total += tl.load(at, mask=j < size, other=0.0)
    tl.store(out + k.to(tl.int64) * out_stride + j, total.to(out.dtype.element_ty), mask=j < size)
