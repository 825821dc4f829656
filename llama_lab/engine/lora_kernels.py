"""The kernels that triton_lora.py launches: a tile of a product each, with dropout computed where its input is read.

K adapters, P adapted layers of a projection, N tokens of each adapter, R rank, D inputs. A sum that is cut into parts
has one program a part, which writes its own. Where a tile begins is counted in 64 bits, since long micro-batches have
more numbers than 32 bits count; what a place is hashed by may wrap round.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

FACTOR_1, FACTOR_2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B - 2**32)


@triton.jit
def _kept(row, column, key):
    """Which numbers dropout keeps, at places ``row + column``: as engine/dropout.py, whose first product is made of a
    row's and a column's, which are few."""
    h = (row + tl.load(key)) * FACTOR_1 + column * FACTOR_1
    h = (h ^ (h.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True) ^ tl.load(key + 1)) * FACTOR_2
    return h >= tl.load(key + 2)


@triton.jit
def _factor(key):
    """By which what is kept is multiplied: LoRA's scale, and that of dropout."""
    return tl.load(key + 3).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_parts"])
def thinned_low_kernel(
    x,
    a,
    keys,
    out,
    num_tokens,
    a_stride,
    keys_stride_k,
    keys_stride_p,
    num_parts,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``A dropout(x)``: x (K, N, D), a (K, P, R, D), out (parts, K, P, N, R). A program takes TOKENS x RANKS of a part
    of D."""
    # layers that read the same input run beside each other, so that all but one find it in the cache
    i, first_rank = tl.program_id(0) % P, tl.program_id(0) // P * RANKS
    part, num_adapters = tl.program_id(2) % num_parts, tl.num_programs(2) // num_parts
    k = (tl.program_id(2) // num_parts).to(tl.int64)
    first, here, r = tl.program_id(1) * TOKENS, tl.arange(0, TOKENS), first_rank + tl.arange(0, RANKS)
    n = first + here
    key, x_at, a_at = keys + k * keys_stride_k + i * keys_stride_p, x + (k * num_tokens + first) * D, a + k * a_stride
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    num_tiles = tl.cdiv(D, INPUTS)
    for tile in range(part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts):
        d = tile * INPUTS + tl.arange(0, INPUTS)
        inside = (n < num_tokens)[:, None] & (d < D)[None, :]
        x_tile = tl.load(x_at + here[:, None] * D + d[None, :], mask=inside, other=0.0)
        a_tile = tl.load(
            a_at + (i * R + r[None, :]) * D + d[:, None], mask=(r < R)[None, :] & (d < D)[:, None], other=0.0
        )
        x_tile = tl.where(_kept(n[:, None] * D, d[None, :], key), x_tile, 0.0).to(a_tile.dtype)
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    place = ((part * num_adapters + k) * P + i) * num_tokens
    mask = (n < num_tokens)[:, None] & (r < R)[None, :]
    tl.store(out + (place + n[:, None]) * R + r[None, :], (total * _factor(key)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _entering(x, weight, rstd, row, here, d, num_left, D: tl.constexpr, SOURCE: tl.constexpr):
    """What entered a projection, rounded as it was then: of the tokens from `row` on.

    SOURCE is one of triton_lora.py: 0 what `x` says itself, 1 its norm, 2 what the gate makes of it.
    """
    inside = (here < num_left)[:, None] & (d < D)[None, :]
    if SOURCE == 2:
        at = x + row * (2 * D) + here[:, None] * (2 * D) + d[None, :]
        gate = tl.load(at, mask=inside, other=0.0)
        return gate_of(gate, tl.load(at + D, mask=inside, other=0.0).to(tl.float32))
    x_tile = tl.load(x + row * D + here[:, None] * D + d[None, :], mask=inside, other=0.0)
    if SOURCE == 1:
        by = tl.load(rstd + row + here, mask=here < num_left, other=0.0)
        wide = x_tile.to(tl.float32) * by[:, None] * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        return wide.to(x_tile.dtype)
    return x_tile


@triton.jit(do_not_specialize=["num_parts"])
def thinned_grad_a_kernel(
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
    num_parts,
    P: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    SOURCE: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Gradient of A, ``lowᵀ dropout(x)``: low (K, P, N, R), out (parts, K, P, R, D); x, weight and rstd as `_entering`
    takes them. A program takes RANKS x INPUTS of a part of N."""
    i, first_rank = tl.program_id(0) % P, tl.program_id(0) // P * RANKS
    part, num_adapters = tl.program_id(2) % num_parts, tl.num_programs(2) // num_parts
    k = (tl.program_id(2) // num_parts).to(tl.int64)
    d, r = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS), first_rank + tl.arange(0, RANKS)
    key, low_at = keys + k * keys_stride_k + i * keys_stride_p, low + (k * P + i) * num_tokens * R
    total = tl.zeros((RANKS, INPUTS), dtype=tl.float32)
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    for tile in range(part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts):
        first, here = tile * TOKENS, tl.arange(0, TOKENS)
        n = first + here
        low_mask = (r < R)[:, None] & (n < num_tokens)[None, :]
        low_tile = tl.load(low_at + n[None, :] * R + r[:, None], mask=low_mask, other=0.0)
        x_tile = _entering(x, weight, rstd, k * num_tokens + first, here, d, num_tokens - first, D, SOURCE)
        x_tile = tl.where(_kept(n[:, None] * D, d[None, :], key), x_tile, 0.0).to(low_tile.dtype)
        total = tl.dot(low_tile, x_tile, total, input_precision="ieee")
    at = out + (part * num_adapters + k) * out_stride + (i * R + r[:, None]) * D + d[None, :]
    tl.store(at, (total * _factor(key)).to(out.dtype.element_ty), mask=(r < R)[:, None] & (d < D)[None, :])


@triton.jit
def gate_of(gate, up):
    """``silu(gate) · up``, in the type of `gate`."""
    wide = gate.to(tl.float32)
    return (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype)


@triton.jit
def through_gate(grad, gate, up):
    """Gradients of gate and up from that of ``silu(gate) · up``."""
    sigmoid = 1 / (1 + tl.exp(-gate))
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


@triton.jit
def add_thinned_kernel(
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
    """``grad + Σ dropout(low A)`` over the layers: grad (K, N, D), low (K, P, N, R), a (K, P, R, D). Where GATED it
    goes back through the gate at once: gate_up and out are (K, N, 2 D), else out is (K, N, D)."""
    k = tl.program_id(2).to(tl.int64)
    first, here = tl.program_id(0) * TOKENS, tl.arange(0, TOKENS)
    n, d = first + here, tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    inside = (n < num_tokens)[:, None] & (d < D)[None, :]
    row = k * num_tokens + first
    total = tl.load(grad + row * D + here[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(P):
        through = tl.zeros((TOKENS, INPUTS), dtype=tl.float32)
        for first_rank in tl.static_range(0, R, RANKS):
            r = first_rank + tl.arange(0, RANKS)
            low_at = low + ((k * P + i) * num_tokens + n[:, None]) * R + r[None, :]
            low_tile = tl.load(low_at, mask=(n < num_tokens)[:, None] & (r < R)[None, :], other=0.0)
            a_at = a + k * a_stride + (i * R + r[:, None]) * D + d[None, :]
            a_tile = tl.load(a_at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
            through = tl.dot(low_tile, a_tile, through, input_precision="ieee")
        key = keys + k * keys_stride_k + i * keys_stride_p
        total += tl.where(_kept(n[:, None] * D, d[None, :], key), through * _factor(key), 0.0)
    if GATED:
        at = row * (2 * D) + here[:, None] * (2 * D) + d[None, :]
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + D, mask=inside, other=0.0).to(tl.float32)
        of_gate, of_up = through_gate(total, gate, up)
        tl.store(out + at, of_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + D, of_up.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * D + here[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_parts"])
def back_low_kernel(
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
    num_parts,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Gradient of B, ``gradᵀ low``, and of the low-rank products, ``grad B``, from one reading of the gradient:
    grad (K, N, all O), low (K, P, N, R), b (K, P, O, R), out as b in parts of N, low_out as low in parts of O."""
    num_o: tl.constexpr = tl.cdiv(SIZE, OUTPUTS)
    o_tile, i, part = tl.program_id(0) % num_o, tl.program_id(0) // num_o, tl.program_id(1)
    k, num_adapters = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    o, r = o_tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, RANKS)
    b_mask, b_place = (o < SIZE)[:, None] & (r < R)[None, :], (i * SIZE + o[:, None]) * R + r[None, :]
    b_tile = tl.load(b + k * b_k + b_place, mask=b_mask, other=0.0)
    total = tl.zeros((OUTPUTS, RANKS), dtype=tl.float32)
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    for tile in range(part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts):
        first, here = tile * TOKENS, tl.arange(0, TOKENS)
        n = first + here
        n_mask = (n < num_tokens)[:, None]
        grad_at = grad + k * grad_k + tl.cast(first, tl.int64) * grad_n + here[:, None] * grad_n + i * step + o[None, :]
        grad_tile = tl.load(grad_at, mask=n_mask & (o < SIZE)[None, :], other=0.0)
        low_at = low + k * low_k + i * low_p + n[:, None] * low_n + r[None, :]
        low_tile = tl.load(low_at, mask=n_mask & (r < R)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad_tile), low_tile, total, input_precision="ieee")
        of_low = tl.dot(grad_tile, b_tile, input_precision="ieee")
        at = low_out + (o_tile * num_adapters + k) * low_out_k + (i * num_tokens + n[:, None]) * R + r[None, :]
        tl.store(at, of_low.to(low_out.dtype.element_ty), mask=n_mask & (r < R)[None, :])
    tl.store(out + (part * num_adapters + k) * out_k + b_place, total.to(out.dtype.element_ty), mask=b_mask)


@triton.jit
def added_up_kernel(parts, out, size, out_stride, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """``Σ parts``: parts (PARTS, K, size), out (K, size) whose adapters lie `out_stride` apart."""
    j, k, num_adapters = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for part in range(PARTS):
        at = parts + (part * num_adapters + k).to(tl.int64) * size + j
        total += tl.load(at, mask=j < size, other=0.0)
    tl.store(out + k.to(tl.int64) * out_stride + j, total.to(out.dtype.element_ty), mask=j < size)
