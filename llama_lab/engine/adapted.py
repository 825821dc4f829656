"""Linear layers that share their input, with the LoRA on each, forward and backward without autograd.

K adapters, P adapted layers, N tokens of each adapter, R rank, D inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_lab.engine.adapter import Matrices
from llama_lab.engine.dropout import drawn
from llama_lab.engine.frozen import Frozen

IntoA = list[Tensor] | None
"""(K, N, D) for each adapted layer of a projection; None where all read the input as it is."""


@dataclass(kw_only=True)
class Projection:
    """Linear layers that share their input: ``W x``, and ``s B A dropout(x)`` on those that are adapted."""

    frozen: Frozen
    places: list[slice]
    """The outputs of each adapted layer."""
    share: float
    """Dropout."""
    scale_K: Tensor
    keys: slice
    """Its adapted layers in the keys of a step."""
    work: Matrices
    grad: Matrices

    @property
    def num_adapted(self) -> int:
        return len(self.places)

    def draw(self, keys: Tensor, x_KND: Tensor) -> Tensor | None:
        """What decides about the dropout of this micro-batch; None where nothing is left out."""
        if not self.share or not self.num_adapted:
            return None
        num_adapters, num_tokens, width = x_KND.shape
        keys_KPW = keys[self.keys].view(self.num_adapted, num_adapters, -1).transpose(0, 1)
        return drawn(keys_KPW, num_tokens, width, self.share)

    def forward(self, x_KND: Tensor, into_a: IntoA) -> tuple[Tensor, Tensor | None]:
        """(K, N, all O) and the low-rank products (K, P, N, R).

        Args:
            into_a: what goes into the A of each layer where there is dropout; None where that is x.
        """
        y_KNO = (x_KND.flatten(0, 1) @ self.frozen.weight().t()).unflatten(0, x_KND.shape[:2])
        low_KPNR = self.low(x_KND, into_a)
        if low_KPNR is not None:
            for i, place in enumerate(self.places):
                y_KNO[..., place].baddbmm_(low_KPNR[:, i], self.work.b_KOR[i].transpose(1, 2))
        return y_KNO, low_KPNR

    def low(self, x_KND: Tensor, into_a: IntoA) -> Tensor | None:
        """``s A dropout(x)`` of each adapted layer."""
        if not self.num_adapted:
            return None
        a_KPRD = self.work.a_KPRD
        if into_a is None:
            low = torch.bmm(x_KND, a_KPRD.flatten(1, 2).transpose(1, 2))
            low_KPNR = low.unflatten(2, a_KPRD.shape[1:3]).transpose(1, 2)
        else:
            low_KPNR = x_KND.new_empty(len(x_KND), self.num_adapted, x_KND.shape[1], a_KPRD.shape[2])
            for i, x_i in enumerate(into_a):
                _product(x_i, a_KPRD[:, i].transpose(1, 2), out=low_KPNR[:, i])
        return low_KPNR.mul_(self.scale_K[:, None, None, None])

    def backward_low(self, grad_KNO: Tensor, low_KPNR: Tensor | None) -> Tensor | None:
        """Gradients of B, written where they belong; that of the low-rank products is returned."""
        if low_KPNR is None:
            return None
        grad_low = torch.empty(low_KPNR.shape, dtype=low_KPNR.dtype, device=low_KPNR.device)
        for i, place in enumerate(self.places):
            grad_i = grad_KNO[..., place]
            _product(grad_i.transpose(1, 2), low_KPNR[:, i], out=self.grad.b_KOR[i])
            _product(grad_i, self.work.b_KOR[i], out=grad_low[:, i])
        return grad_low.mul_(self.scale_K[:, None, None, None])

    def backward_a(self, grad_low_KPNR: Tensor, x_KND: Tensor | None, into_a: IntoA) -> None:
        """Gradient of A."""
        grad_a = self.grad.a_KPRD
        if into_a is None:
            assert x_KND is not None
            low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)  # (K, N, P R)
            grad_a.copy_(torch.bmm(low.transpose(1, 2), x_KND).unflatten(1, grad_a.shape[1:3]))
            return
        for i, x_i in enumerate(into_a):
            _product(grad_low_KPNR[:, i].transpose(1, 2), x_i, out=grad_a[:, i])

    def backward_x(
        self, grad_KNO: Tensor, grad_low_KPNR: Tensor | None, *, dropout: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Gradient of x through the base, and what comes through each A, which dropout has still to pass."""
        grad_KND = (grad_KNO.flatten(0, 1) @ self.frozen.weight()).unflatten(0, grad_KNO.shape[:2])
        if grad_low_KPNR is None:
            return grad_KND, None
        a_KPRD = self.work.a_KPRD
        if dropout:
            return grad_KND, [torch.bmm(grad_low_KPNR[:, i], a_KPRD[:, i]) for i in range(self.num_adapted)]
        low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)
        return grad_KND.baddbmm_(low, a_KPRD.flatten(1, 2)), None


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Matrix products of K pairs into `out`, which may lie apart."""
    if out.is_contiguous():
        torch.bmm(x, y, out=out)
    else:
        out.copy_(torch.bmm(x, y))
