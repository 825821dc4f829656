"""Steps as kernels of our own, where the compiler's and the libraries' read or write the same numbers several times.

On a GPU by Triton, elsewhere by plain operations, which say what is computed. K adapters, P adapted layers, W words of
a dropout key, N tokens of each adapter, R rank, D inputs, I intermediate size. Gradients of A and B lie in a buffer of
all of an adapter, so that K is not next to what follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_lab.engine.dropout import thinned
from llama_lab.engine.entering import Entering
from llama_lab.engine.pieces import Pieces

PLAIN = Pieces(compiled=False)


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


def add_thinned(grad_KND: Tensor, low_KPNR: Tensor, a_KPRD: Tensor, keys_KPW: Tensor) -> None:
    """Add what comes back through each A and its dropout to the gradient of the input."""
    if grad_KND.is_cuda:
        from llama_lab.engine import triton_kernels

        triton_kernels.add_thinned(grad_KND, low_KPNR, a_KPRD, keys_KPW)
        return
    for i in range(low_KPNR.shape[1]):
        grad_KND += thinned(torch.bmm(low_KPNR[:, i], a_KPRD[:, i]), keys_KPW[:, i])


def gate_back(grad_KNI: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of (K, N, 2 I), gate first, from that of ``silu(gate) · up``."""
    if grad_KNI.is_cuda:
        from llama_lab.engine import triton_kernels

        return triton_kernels.gate_back(grad_KNI, gate_up)
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    of_gate = grad_KNI * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, grad_KNI * gate * sigmoid], dim=-1).to(gate_up.dtype)
