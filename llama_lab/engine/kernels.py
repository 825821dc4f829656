"""Steps as kernels of our own, where the compiler's and the libraries' read or write the same numbers several times.

On a GPU by Triton, elsewhere by plain operations, which say what is computed. K adapters, P adapted layers, W words of
a dropout key, N tokens of each adapter, R rank, D inputs, O outputs of all layers, I intermediate size, H heads, E
numbers of a head. A, B and their gradients lie in a buffer of all of an adapter, so that adapters lie apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import silu

from llama_lab.engine.dropout import thinned
from llama_lab.engine.pieces import Pieces

if TYPE_CHECKING:
    from llama_lab.engine.entering import Entering

PLAIN = Pieces(compiled=False)
SMALL_RANK = 32
"""Up to which `back_low` is faster at once than by two products."""


def thinned_low(x_KND: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> Tensor:
    """``A dropout(x)`` of each layer, (K, P, N, R)."""
    if x_KND.is_cuda:
        from llama_lab.engine import triton_lora

        return triton_lora.thinned_low(x_KND, a_KPRD, keys_KPW)
    layers = range(a_KPRD.shape[1])
    return torch.stack([torch.bmm(thinned(x_KND, keys_KPW[:, i]), a_KPRD[:, i].mT) for i in layers], dim=1)


def thinned_grad_a(entering: Entering, low_KPNR: Tensor, keys_KPW: Tensor, out_KPRD: Tensor) -> None:
    """Gradient of each A, from that of its output and from what entered the projection."""
    if low_KPNR.is_cuda:
        from llama_lab.engine import triton_lora

        triton_lora.thinned_grad_a(entering, low_KPNR, keys_KPW, out_KPRD)
        return
    x_KND = entering.value(PLAIN)
    for i in range(low_KPNR.shape[1]):
        torch.bmm(low_KPNR[:, i].mT, thinned(x_KND, keys_KPW[:, i]), out=out_KPRD[:, i])


def back_low(
    grad_KNO: Tensor, places: Sequence[slice], low_KPNR: Tensor, b_KOR: Sequence[Tensor], out_KOR: Sequence[Tensor]
) -> Tensor:
    """Gradients of each B into `out`, and of the low-rank products, (K, P, N, R), returned."""
    if grad_KNO.is_cuda and low_KPNR.shape[3] <= SMALL_RANK:
        from llama_lab.engine import triton_lora

        return triton_lora.back_low(grad_KNO, places, low_KPNR, b_KOR, out_KOR)
    grad_low = torch.empty(low_KPNR.shape, dtype=low_KPNR.dtype, device=low_KPNR.device)
    for i, place in enumerate(places):
        grad_i = grad_KNO[..., place]
        torch.bmm(grad_i.mT, low_KPNR[:, i], out=out_KOR[i])
        torch.bmm(grad_i, b_KOR[i], out=grad_low[:, i])
    return grad_low


def add_thinned(grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> None:
    """Add what comes back through each A and its dropout to the gradient of the input."""
    if grad_KND.is_cuda:
        from llama_lab.engine import triton_lora

        triton_lora.add_thinned(grad_KND, low_KPNR, a_KPRD, keys_KPW)
        return
    for i in range(low_KPNR.shape[1]):
        grad_KND += thinned(torch.bmm(low_KPNR[:, i], a_KPRD[:, i]), keys_KPW[:, i])


def gate_back_thinned(grad_KNI: Tensor, low_KPNR: Tensor, a_KPRI: Tensor, keys_KPW: Tensor, gate_up: Tensor) -> Tensor:
    """`add_thinned`, then `gate_back`; the gradient given is used up."""
    if grad_KNI.is_cuda:
        from llama_lab.engine import triton_lora

        return triton_lora.gate_back_thinned(grad_KNI, low_KPNR, a_KPRI, keys_KPW, gate_up)
    add_thinned(grad_KNI, low_KPNR, a_KPRI, keys_KPW)
    return gate_back(grad_KNI, gate_up)


def gate(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202) of (..., 2 I), gate first."""
    if gate_up.is_cuda:
        from llama_lab.engine import triton_kernels

        return triton_kernels.gate(gate_up)
    first, up = gate_up.chunk(2, dim=-1)
    return silu(first) * up


def gate_back(grad_KNI: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of (K, N, 2 I), gate first, from that of ``silu(gate) · up``."""
    if grad_KNI.is_cuda:
        from llama_lab.engine import triton_kernels

        return triton_kernels.gate_back(grad_KNI, gate_up)
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    of_gate = grad_KNI * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, grad_KNI * gate * sigmoid], dim=-1).to(gate_up.dtype)


def turn(qkv_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, num_turned: int) -> None:
    """Rotary position embedding (arXiv 2104.09864) of the first `num_turned` heads, in place.

    Args:
        sin_NE: its first half negative, so that turning is one sum over the halves swapped. With its own halves swapped
            a gradient is turned back.
    """
    if qkv_NHE.is_cuda:
        from llama_lab.engine import triton_kernels

        triton_kernels.turn(qkv_NHE, cos_NE, sin_NE, num_turned)
        return
    part = qkv_NHE[:, :num_turned]
    part.copy_(part * cos_NE[:, None] + swapped(part) * sin_NE[:, None])


def swapped(x_NHE: Tensor) -> Tensor:
    """The halves of each head in each other's place."""
    return x_NHE.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
