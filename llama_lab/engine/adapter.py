"""All LoRA matrices of a model in one flat buffer, so that one operation steps or clips them all.

K adapters, P adapted layers of a projection, R rank, D inputs, O outputs of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Numbers to whose multiples every matrix is moved, so that products read whole lines of memory."""


@dataclass(kw_only=True)
class Matrices:
    """A and B of the adapted layers of one projection, as views of a flat buffer."""

    a_KPRD: Tensor
    b_KOR: list[Tensor]
    """One a layer."""


class Adapter:
    """K adapters of one shape: fp32 masters, their copy in the compute type, and its gradient."""

    def __init__(self, projections: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> None:
        """Take over the LoRA of PEFT's layers: their parameters become views of the flat master.

        Args:
            projections: PEFT's LoRA layers of each projection; they share input and rank.
            dtype: the compute type.
        """
        self.layers = [list(layers) for layers in projections]
        size = sum(_padded(t.numel()) for layers in self.layers for t in _parameters(layers))
        wide = torch.promote_types(dtype, torch.float32)
        self.master_KS = torch.zeros(1, size, dtype=wide, device=device)
        self.work_KS = self.master_KS if dtype is wide else torch.zeros(1, size, dtype=dtype, device=device)
        self.grad_KS = torch.zeros(1, size, dtype=dtype, device=device)
        for layers, matrices in zip(self.layers, self.views(self.master_KS), strict=True):
            for i, layer in enumerate(layers):
                _take_over(_only(layer.lora_A).weight, matrices.a_KPRD[0, i])
                _take_over(_only(layer.lora_B).weight, matrices.b_KOR[i][0])
        self.refresh()

    def views(self, flat_KS: Tensor) -> list[Matrices]:
        """The matrices of each projection in a buffer of the masters' layout."""
        found, place = [], 0
        for layers in self.layers:
            a, rest = _parameters(layers)[0], _parameters(layers)[1:]
            a_KPRD = flat_KS[:, place : place + a.numel()].unflatten(1, a.shape)
            place += _padded(a.numel())
            b_KOR = []
            for b in rest:
                b_KOR.append(flat_KS[:, place : place + b.numel()].unflatten(1, b.shape))
                place += _padded(b.numel())
            found.append(Matrices(a_KPRD=a_KPRD, b_KOR=b_KOR))
        return found

    def refresh(self) -> None:
        """The copy in the compute type follows the masters."""
        if self.work_KS is not self.master_KS:
            self.work_KS.copy_(self.master_KS)

    def release(self) -> None:
        """Give every PEFT parameter its own memory again."""
        for layers in self.layers:
            for layer in layers:
                for weight in (_only(layer.lora_A).weight, _only(layer.lora_B).weight):
                    weight.data = weight.data.clone()


def _parameters(layers: Sequence[Any]) -> list[Tensor]:
    """Shapes alone: all A above each other, then each B."""
    if not layers:
        return [torch.empty(0, device="meta")]
    a = _only(layers[0].lora_A).weight
    return [
        torch.empty(len(layers), *a.shape, device="meta"),
        *(torch.empty(_only(layer.lora_B).weight.shape, device="meta") for layer in layers),
    ]


def _take_over(parameter: Any, view: Tensor) -> None:
    view.copy_(parameter.data)
    parameter.data = view


def _only(modules: Any) -> Any:
    return next(iter(modules.values()))


def _padded(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
