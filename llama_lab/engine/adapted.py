"""Linear layers that share their input, with the LoRA on each, forward and backward without autograd.

K adapters, P adapted layers, W words of a dropout key, N tokens of each adapter, R rank, D inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_lab.engine.adapter import Matrices
from llama_lab.engine.entering import Entering
from llama_lab.engine.frozen import Frozen
from llama_lab.engine.kernels import (
    add_thinned,
    back_low,
    gate_back,
    gate_back_thinned,
    thinned_grad_a,
    thinned_low,
)


@dataclass(kw_only=True)
class Projection:
    """Linear layers that share their input: ``W x``, and ``s B A dropout(x)`` on those that are adapted."""

    frozen: Frozen
    places: list[slice]
    """The outputs of each adapted layer."""
    dropout: bool
    """Whether inputs go through dropout on their way into A; the keys say how many are left out."""
    scale_K: Tensor
    adapted: slice
    """Its adapted layers among those of all blocks."""
    work: Matrices
    grad: Matrices
    """K here is that of the buffers; products take as many of the first adapters as there are inputs."""

    @property
    def num_adapted(self) -> int:
        return len(self.places)

    def keys(self, keys_PKW: Tensor) -> Tensor | None:
        """(K, P, W), the dropout keys of this projection out of those of all; None where nothing is left out."""
        return keys_PKW[self.adapted].transpose(0, 1) if self.dropout and self.num_adapted else None

    def forward(self, x_KND: Tensor, keys_KPW: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(K, N, all O) and the low-rank products (K, P, N, R)."""
        low_KPNR, x, num_outputs = self.low(x_KND, keys_KPW), x_KND.flatten(0, 1), sum(self.frozen.sizes)
        if low_KPNR is None:
            return (x @ self.frozen.weight().t()).unflatten(0, x_KND.shape[:2]), None
        y_KNO = x_KND.new_empty(*x_KND.shape[:2], num_outputs)
        if sum(place.stop - place.start for place in self.places) < num_outputs:
            y_KNO.zero_()
        b_KOR = self.work.first(len(x_KND)).b_KOR
        for i, place in enumerate(self.places):
            torch.bmm(low_KPNR[:, i], b_KOR[i].transpose(1, 2), out=y_KNO[..., place])
        # last, since the large product reads what it adds to at no cost
        y_KNO.flatten(0, 1).addmm_(x, self.frozen.weight().t())
        return y_KNO, low_KPNR

    def low(self, x_KND: Tensor, keys_KPW: Tensor | None) -> Tensor | None:
        """``s A dropout(x)`` of each adapted layer."""
        if not self.num_adapted:
            return None
        a_KPRD = self.work.first(len(x_KND)).a_KPRD
        if keys_KPW is not None:
            return thinned_low(x_KND, a_KPRD, keys_KPW)
        low = torch.bmm(x_KND, a_KPRD.flatten(1, 2).transpose(1, 2))
        return self._scaled(low.unflatten(2, a_KPRD.shape[1:3]).transpose(1, 2))

    def backward_low(self, grad_KNO: Tensor, low_KPNR: Tensor | None) -> Tensor | None:
        """Gradients of B, written where they belong; that of the low-rank products is returned."""
        if low_KPNR is None:
            return None
        num_adapters = len(grad_KNO)
        grad_b, b_KOR = self.grad.first(num_adapters).b_KOR, self.work.first(num_adapters).b_KOR
        return self._scaled(back_low(grad_KNO, self.places, low_KPNR, b_KOR, grad_b))

    def backward_a(self, grad_low_KPNR: Tensor, entering: Entering, keys_KPW: Tensor | None) -> None:
        """Gradient of A."""
        grad_a = self.grad.first(len(grad_low_KPNR)).a_KPRD
        if keys_KPW is not None:
            thinned_grad_a(entering, grad_low_KPNR, keys_KPW, grad_a)
            return
        low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)  # (K, N, P R)
        torch.bmm(low.transpose(1, 2), entering.value(self.frozen.pieces), out=grad_a.flatten(1, 2))

    def backward_x(self, grad_KNO: Tensor, grad_low_KPNR: Tensor | None, keys_KPW: Tensor | None) -> Tensor:
        """Gradient of x."""
        grad_KND = self._past_lora(grad_KNO)
        if grad_low_KPNR is None:
            return grad_KND
        a_KPRD = self.work.first(len(grad_KNO)).a_KPRD
        if keys_KPW is None:
            low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)
            return grad_KND.baddbmm_(low, a_KPRD.flatten(1, 2))
        add_thinned(grad_KND, grad_low_KPNR, a_KPRD, keys_KPW)
        return grad_KND

    def backward_gated(
        self, grad_KNO: Tensor, grad_low_KPNR: Tensor | None, keys_KPW: Tensor | None, gate_up: Tensor
    ) -> Tensor:
        """Gradient of the gate and up projections behind which x comes."""
        if grad_low_KPNR is None or keys_KPW is None:
            return gate_back(self.backward_x(grad_KNO, grad_low_KPNR, keys_KPW), gate_up)
        a_KPRD = self.work.first(len(grad_KNO)).a_KPRD
        return gate_back_thinned(self._past_lora(grad_KNO), grad_low_KPNR, a_KPRD, keys_KPW, gate_up)

    def _past_lora(self, grad_KNO: Tensor) -> Tensor:
        """What comes back through the frozen weights."""
        return (grad_KNO.flatten(0, 1) @ self.frozen.weight()).unflatten(0, grad_KNO.shape[:2])

    def _scaled(self, low_KPNR: Tensor) -> Tensor:
        if self.dropout:  # the dropout keys have scaled what goes into A
            return low_KPNR
        return low_KPNR.mul_(self.scale_K[: len(low_KPNR), None, None, None])
