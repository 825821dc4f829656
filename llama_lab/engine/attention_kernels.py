"""The kernels that triton_attention.py launches: causal attention within rows that lie one behind the other.

A program takes a tile of the stream, whatever rows lie in it, and reads from where the first of them begins or to where
the last of them ends (FlashAttention-2, arXiv 2307.08691, but for that). K adapters, N tokens of each adapter, H heads,
E numbers of a head. Sums are added up in an order that never changes; exponents are to the base 2. What is not seen has
a score of `NEVER`, not -inf: where a query sees nothing of a tile, the largest score is subtracted from itself. A tile
ends with its adapter, since a number that is not finite goes through a share of 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)


@triton.jit
def _tile(at, start, here, stride, num_left, E: tl.constexpr):
    """(places, E) from the place `start` on; 0 beyond `num_left`."""
    e = tl.arange(0, E)
    where = at + start.to(tl.int64) * stride + here[:, None] * stride + e[None, :]
    return tl.load(where, mask=(here < num_left)[:, None], other=0.0)


@triton.jit
def _store_turned(at, x, cos, sin, start, here, stride, num_left, E: tl.constexpr):
    """x (places, E), turned as `kernels.turn` does it, to the place `start` and on."""
    half: tl.constexpr = E // 2
    low, high = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)))
    e, inside = tl.arange(0, half), (here < num_left)[:, None]
    angle = start.to(tl.int64) * E + here[:, None] * E + e[None, :]
    cos_low, cos_high = _angle(cos + angle, inside), _angle(cos + angle + half, inside)
    sin_low, sin_high = _angle(sin + angle, inside), _angle(sin + angle + half, inside)
    to = at + start.to(tl.int64) * stride + here[:, None] * stride + e[None, :]
    tl.store(to, (low * cos_low + high * sin_low).to(at.dtype.element_ty), mask=inside)
    tl.store(to + half, (high * cos_high + low * sin_high).to(at.dtype.element_ty), mask=inside)


@triton.jit
def _angle(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sees(m, n, first_m):
    """Whether the queries m see the keys n: of the same row, and no later ones."""
    return (n <= m) & (n >= first_m)


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    first,
    out,
    lse,
    scale,
    num_tokens,
    qkv_n,
    out_n,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out (K N, H, E) and the logarithms of what its shares were divided by, (H, K N). first (K N): where each token's
    row begins. scale: of the exponents."""
    h, adapter = tl.program_id(1), tl.program_id(2)
    begin, m_0, here = adapter * num_tokens, tl.program_id(0) * QUERIES, tl.arange(0, QUERIES)
    m = m_0 + here
    first_m = tl.load(first + begin + m, mask=m < num_tokens, other=0) - begin
    q_tile = _tile(q + h * E, begin + m_0, here, qkv_n, num_tokens - m_0, E)
    most = tl.full((QUERIES,), NEVER, dtype=tl.float32)
    total, found = tl.zeros((QUERIES,), dtype=tl.float32), tl.zeros((QUERIES, E), dtype=tl.float32)
    kv_at = h // GROUP * E
    for n_0 in range(tl.load(first + begin + m_0) - begin, tl.minimum(m_0 + QUERIES, num_tokens), KEYS):
        there = tl.arange(0, KEYS)
        k_tile = _tile(k + kv_at, begin + n_0, there, qkv_n, num_tokens - n_0, E)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(_sees(m[:, None], (n_0 + there)[None, :], first_m[:, None]), scores, NEVER)
        more = tl.maximum(most, tl.max(scores, 1))
        shares, kept = tl.exp2(scores - more[:, None]), tl.exp2(most - more)
        total, most = total * kept + tl.sum(shares, 1), more
        v_tile = _tile(v + kv_at, begin + n_0, there, qkv_n, num_tokens - n_0, E)
        found = tl.dot(shares.to(v_tile.dtype), v_tile, found * kept[:, None], input_precision="ieee")
    inside, e = m < num_tokens, tl.arange(0, E)
    tl.store(lse + h.to(tl.int64) * num_tokens * tl.num_programs(2) + begin + m, most + tl.log2(total), mask=inside)
    at = out + (begin + m_0).to(tl.int64) * out_n + h * E + here[:, None] * out_n + e[None, :]
    tl.store(at, (found / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attend_back_q_kernel(
    grad,
    q,
    k,
    v,
    first,
    cos,
    sin,
    out,
    lse,
    delta,
    grad_q,
    scale,
    back_scale,
    num_tokens,
    qkv_n,
    out_n,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradient of q before it was turned, which lies as q does, and delta, the sums of ``grad · out``, (H, K N)."""
    h, adapter = tl.program_id(1), tl.program_id(2)
    begin, m_0, here = adapter * num_tokens, tl.program_id(0) * QUERIES, tl.arange(0, QUERIES)
    m = m_0 + here
    inside, by_head = m < num_tokens, h.to(tl.int64) * num_tokens * tl.num_programs(2) + begin
    first_m = tl.load(first + begin + m, mask=inside, other=0) - begin
    q_tile = _tile(q + h * E, begin + m_0, here, qkv_n, num_tokens - m_0, E)
    g_tile = _tile(grad + h * E, begin + m_0, here, out_n, num_tokens - m_0, E)
    out_tile = _tile(out + h * E, begin + m_0, here, out_n, num_tokens - m_0, E)
    delta_m = tl.sum(g_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + by_head + m, delta_m, mask=inside)
    lse_m = tl.load(lse + by_head + m, mask=inside, other=0.0)
    found = tl.zeros((QUERIES, E), dtype=tl.float32)
    kv_at = h // GROUP * E
    for n_0 in range(tl.load(first + begin + m_0) - begin, tl.minimum(m_0 + QUERIES, num_tokens), KEYS):
        there = tl.arange(0, KEYS)
        k_tile = _tile(k + kv_at, begin + n_0, there, qkv_n, num_tokens - n_0, E)
        v_tile = _tile(v + kv_at, begin + n_0, there, qkv_n, num_tokens - n_0, E)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        seen = _sees(m[:, None], (n_0 + there)[None, :], first_m[:, None])
        shares = tl.where(seen, tl.exp2(scores - lse_m[:, None]), 0.0)
        g_shares = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        g_scores = (shares * (g_shares - delta_m[:, None])).to(k_tile.dtype)
        found = tl.dot(g_scores, k_tile, found, input_precision="ieee")
    _store_turned(grad_q + h * E, found * back_scale, cos, sin, begin + m_0, here, qkv_n, num_tokens - m_0, E)


@triton.jit
def attend_back_kv_kernel(
    grad,
    q,
    k,
    v,
    first,
    last,
    cos,
    sin,
    lse,
    delta,
    grad_k,
    grad_v,
    scale,
    back_scale,
    num_tokens,
    qkv_n,
    out_n,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of k before it was turned and of v, which lie as those do. last (K N): where each token's row ends."""
    g, adapter = tl.program_id(1), tl.program_id(2)
    begin, n_0, there = adapter * num_tokens, tl.program_id(0) * KEYS, tl.arange(0, KEYS)
    n = n_0 + there
    k_tile = _tile(k + g * E, begin + n_0, there, qkv_n, num_tokens - n_0, E)
    v_tile = _tile(v + g * E, begin + n_0, there, qkv_n, num_tokens - n_0, E)
    found_k, found_v = tl.zeros((KEYS, E), dtype=tl.float32), tl.zeros((KEYS, E), dtype=tl.float32)
    end = tl.load(last + begin + tl.minimum(n_0 + KEYS, num_tokens) - 1) - begin
    for h in range(g * GROUP, (g + 1) * GROUP):
        by_head = tl.cast(h, tl.int64) * num_tokens * tl.num_programs(2) + begin
        for m_0 in range(n_0, end, QUERIES):
            here = tl.arange(0, QUERIES)
            m, inside = m_0 + here, m_0 + here < num_tokens
            q_tile = _tile(q + h * E, begin + m_0, here, qkv_n, num_tokens - m_0, E)
            g_tile = _tile(grad + h * E, begin + m_0, here, out_n, num_tokens - m_0, E)
            first_m = tl.load(first + begin + m, mask=inside, other=0) - begin
            lse_m, delta_m = (
                tl.load(lse + by_head + m, mask=inside, other=0.0),
                tl.load(delta + by_head + m, mask=inside, other=0.0),
            )
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            seen = _sees(m[None, :], n[:, None], first_m[None, :]) & inside[None, :]
            shares = tl.where(seen, tl.exp2(scores - lse_m[None, :]), 0.0)
            found_v = tl.dot(shares.to(g_tile.dtype), g_tile, found_v, input_precision="ieee")
            g_shares = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
            g_scores = (shares * (g_shares - delta_m[None, :])).to(q_tile.dtype)
            found_k = tl.dot(g_scores, q_tile, found_k, input_precision="ieee")
    _store_turned(grad_k + g * E, found_k * back_scale, cos, sin, begin + n_0, there, qkv_n, num_tokens - n_0, E)
    at = (begin + n_0).to(tl.int64) * qkv_n + g * E + there[:, None] * qkv_n + tl.arange(0, E)[None, :]
    tl.store(grad_v + at, found_v.to(grad_v.dtype.element_ty), mask=(n < num_tokens)[:, None])
