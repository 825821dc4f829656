"""LoRA's own products on a GPU, with dropout inside: what it leaves of an input is computed where it is read.

As kernels.py says it in plain operations. K adapters, P adapted layers of a projection, W words of a dropout key,
N tokens of each adapter, R rank, D inputs, O outputs of a layer. Sums over many numbers are cut into parts, each a
program, and added up in an order that never changes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
import triton
from torch import Tensor

from llama_lab.engine import lora_kernels
from llama_lab.engine.entering import Entering, Gated, Normed

LOW_TILE, GRAD_A_TILE = (32, 128), (64, 64)
ADD_TILE, ADD_TILE_OF_LARGE_RANKS, GATE_BACK_TILE = (32, 64), (64, 64), (16, 128)
"""Tokens and inputs that a program takes at once, of the kernels with these names; all of them and the next were chosen
by measuring on an H100, for a Llama-2-7B at ranks 16 and 64."""
BACK_TILES = ((64, 512), (64, 128), (32, 64))
"""Tokens and outputs; the first that a multiprocessor has shared memory for."""
BACK_STAGES = 2
"""Tiles that are on their way at once."""
MAX_RANKS = 64
"""Larger ranks are taken in chunks."""
PROGRAMS, MAX_PARTS = 264, 16
"""Programs that keep a GPU busy: two for each of an H100's 132 multiprocessors; and the most parts of a sum."""
COLUMNS = 1024
"""Numbers that a program takes of what is added up at once."""
PLAIN, NORMED, GATED = 0, 1, 2
"""What the kernel of `thinned_grad_a` reads."""


def thinned_low(x_KND: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> Tensor:
    """``A dropout(x)`` of each layer, (K, P, N, R)."""
    (num_adapters, num_tokens, width), (num_layers, rank) = x_KND.shape, a_KPRD.shape[1:3]
    ranks = _tile_of(rank)
    jobs, tiles = num_layers * triton.cdiv(rank, ranks), triton.cdiv(num_tokens, LOW_TILE[0])
    num_parts = _num_parts(jobs * tiles * num_adapters, triton.cdiv(width, LOW_TILE[1]))
    out = x_KND.new_empty(num_adapters, num_layers, num_tokens, rank)
    parts = _parts_of(out, num_parts)
    lora_kernels.thinned_low_kernel[(jobs, tiles, num_adapters * num_parts)](
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
        num_parts=num_parts,
        TOKENS=LOW_TILE[0],
        INPUTS=LOW_TILE[1],
        RANKS=ranks,
        num_warps=4,
        num_stages=_num_stages(x_KND),
    )
    return _added(parts, out)


def thinned_grad_a(entering: Entering, low_KPNR: Tensor, keys_KPW: Tensor, out_KPRD: Tensor) -> None:
    """Gradient of each A, from that of its output and from what entered the projection."""
    source, x, weight, rstd = _unpacked(entering)
    (num_adapters, num_layers, num_tokens, rank), width = low_KPNR.shape, out_KPRD.shape[3]
    tokens, inputs = GRAD_A_TILE
    ranks = _tile_of(rank)
    jobs, tiles = num_layers * triton.cdiv(rank, ranks), triton.cdiv(width, inputs)
    num_parts = _num_parts(jobs * tiles * num_adapters, triton.cdiv(num_tokens, tokens))
    parts = _parts_of(out_KPRD, num_parts)
    lora_kernels.thinned_grad_a_kernel[(jobs, tiles, num_adapters * num_parts)](
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
        num_parts=num_parts,
        TOKENS=tokens,
        INPUTS=inputs,
        RANKS=ranks,
        num_warps=4,
        num_stages=_num_stages(low_KPNR),
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
    tokens, inputs = _add_tile(rank, gated=gate_up is not None)
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(width, inputs), num_adapters)
    lora_kernels.add_thinned_kernel[grid](
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
        TOKENS=tokens,
        INPUTS=inputs,
        RANKS=_tile_of(rank),
        num_warps=4,
    )


def _add_tile(rank: int, *, gated: bool) -> tuple[int, int]:
    if gated:
        return GATE_BACK_TILE
    return ADD_TILE if rank <= MAX_RANKS // 2 else ADD_TILE_OF_LARGE_RANKS


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
    ranks = _tile_of(rank)
    tokens, outputs = _back_tile(grad_KNO, ranks)
    num_tokens, tiles = low_KPNR.shape[2], triton.cdiv(num_outputs, outputs)
    num_parts = _num_parts(tiles * num_layers * num_adapters, triton.cdiv(num_tokens, tokens))
    parts, low_parts = _parts_of(out_KPOR, num_parts), _parts_of(grad_low_KPNR, tiles)
    lora_kernels.back_low_kernel[(tiles * num_layers, num_parts, num_adapters)](
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
        num_parts=num_parts,
        TOKENS=tokens,
        OUTPUTS=outputs,
        RANKS=ranks,
        num_warps=8,
        num_stages=BACK_STAGES,
    )
    _added(parts, out_KPOR)
    _added(low_parts, grad_low_KPNR)


def _back_tile(grad: Tensor, ranks: int) -> tuple[int, int]:
    room = _shared_memory(grad.device.index) if grad.is_cuda else 0
    for tokens, outputs in BACK_TILES:
        if BACK_STAGES * grad.element_size() * tokens * (outputs + ranks) < 0.9 * room:
            return tokens, outputs
    return BACK_TILES[-1]


@cache
def _shared_memory(device: int) -> int:
    """Bytes that a program may have."""
    found: int = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return found


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


def _num_stages(x: Tensor) -> int:
    """Tiles that are on their way at once: fewer of wide numbers, which take more of the shared memory."""
    return 3 if x.element_size() == 2 else 1


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
        lora_kernels.added_up_kernel[grid](
            parts, out, size, out.stride(0), PARTS=parts.shape[0], COLUMNS=COLUMNS, num_warps=4
        )
    return out
