"""All LoRA matrices of K adapters in one flat buffer, so that one operation steps or clips them all.

K adapters, P adapted layers of a projection, R rank (smaller ones zero-padded), D inputs, O outputs of one layer.
S numbers of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def first(self, num_adapters: int) -> Matrices:
        """Those of the first adapters."""
        if num_adapters == len(self.a_KPRD):
            return self
        return Matrices(a_KPRD=self.a_KPRD[:num_adapters], b_KOR=[b[:num_adapters] for b in self.b_KOR])


@dataclass(kw_only=True)
class Layout:
    """Where the matrices of an adapter lie in a flat buffer: of each projection all A above each other, then each B."""

    sizes: list[tuple[int, list[int]]]
    """D, and O of each adapted layer, of each projection."""
    rank: int

    @property
    def size(self) -> int:
        """Numbers of one adapter, the gaps between matrices included."""
        return sum(_padded(number) for d, outs in self.sizes for number in self._numbers(d, outs))

    def views(self, flat_KS: Tensor) -> list[Matrices]:
        """The matrices of each projection."""
        found, place = [], 0
        for d, outs in self.sizes:
            parts = []
            for number in self._numbers(d, outs):
                parts.append(flat_KS[:, place : place + number])
                place += _padded(number)
            a_KPRD = parts[0].unflatten(1, (len(outs), self.rank, d))
            b_KOR = [part.unflatten(1, (o, self.rank)) for part, o in zip(parts[1:], outs, strict=True)]
            found.append(Matrices(a_KPRD=a_KPRD, b_KOR=b_KOR))
        return found

    def rank_indices(self, device: torch.device) -> Tensor:
        """(S,), of each number of an adapter the rank to which it belongs, and the largest there is in the gaps."""
        dtype = torch.uint8 if self.rank < 256 else torch.int16
        found_S = torch.full((self.size,), torch.iinfo(dtype).max, dtype=dtype, device=device)
        ranks_R = torch.arange(self.rank, device=device)
        for matrices in self.views(found_S[None]):
            matrices.a_KPRD.copy_(ranks_R[:, None])
            for b_KOR in matrices.b_KOR:
                b_KOR.copy_(ranks_R)
        return found_S

    def _numbers(self, d: int, outs: list[int]) -> list[int]:
        return [len(outs) * self.rank * d, *(o * self.rank for o in outs)]


class Adapter:
    """K adapters over one base: fp32 masters, their copy in the compute type, and its gradient.

    PEFT's parameters of an adapter that has been taken in are views of its masters.
    """

    def __init__(
        self,
        projections: Sequence[Sequence[Any]],
        *,
        num_rows: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            projections: PEFT's LoRA layers of each projection; they share their input.
            rank: no adapter has a larger one.
            dtype: the compute type.
        """
        self.layers = [list(layers) for layers in projections]
        self.layout = Layout(sizes=_sizes(self.layers), rank=rank)
        shape, wide = (num_rows, self.layout.size), torch.promote_types(dtype, torch.float32)
        self.master_KS = torch.zeros(shape, dtype=wide, device=device)
        self.work_KS = self.master_KS if dtype is wide else torch.zeros(shape, dtype=dtype, device=device)
        self.grad_KS = torch.zeros(shape, dtype=dtype, device=device)
        self.scale_PK = torch.zeros(len(self.layers), num_rows, dtype=wide, device=device)
        """alpha / r, or by what else PEFT scales, of each projection."""
        self.rank_K = torch.zeros(num_rows, dtype=torch.int32, device=device)
        """Without the padding; 0 in an empty slot."""

    def take(self, k: int, name: str) -> None:
        """PEFT's adapter of this name goes into slot `k`."""
        for parameter, view in self._pairs(k, name):
            view.copy_(parameter.data)
            parameter.data = view
        scales = [float(own[0].scaling[name]) if own else 1.0 for own in self._own(name)]
        self.scale_PK[:, k] = self.scale_PK.new_tensor(scales)
        self.rank_K[k] = self.own_layout(name).rank
        self.refresh(k)

    def release(self, k: int, name: str) -> None:
        """Give PEFT's parameters memory of their own again; the slot is empty then."""
        for parameter, _ in self._pairs(k, name):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        for buffer in (self.master_KS, self.work_KS, self.grad_KS, self.rank_K):
            buffer[k].zero_()

    def move(self, name: str, start: int, end: int) -> None:
        """From one slot into an empty one."""
        self.master_KS[end].copy_(self.master_KS[start])
        for parameter, view in self._pairs(end, name):
            parameter.data = view
        self.scale_PK[:, end], self.rank_K[end] = self.scale_PK[:, start], self.rank_K[start]
        self.refresh(end)
        for buffer in (self.master_KS, self.work_KS, self.grad_KS, self.rank_K):
            buffer[start].zero_()

    def refresh(self, k: int) -> None:
        """The copy in the compute type follows the masters."""
        if self.work_KS is not self.master_KS:
            self.work_KS[k].copy_(self.master_KS[k])

    def own_layout(self, name: str) -> Layout:
        """The layout of this adapter alone: its own layers and rank."""
        return Layout(
            sizes=_sizes(self._own(name)), rank=max(layer.r[name] for own in self._own(name) for layer in own)
        )

    def matrices(self, flat_KS: Tensor, k: int, name: str) -> Iterator[Tensor]:
        """A and B of each layer of slot `k` in a buffer of all adapters, without the padding."""
        return _matrices(self.layers, self.layout.views(flat_KS), k, name)

    def own_matrices(self, flat_S: Tensor, name: str) -> Iterator[Tensor]:
        """The same of a buffer in the layout of this adapter alone."""
        return _matrices(self._own(name), self.own_layout(name).views(flat_S[None]), 0, name)

    def _own(self, name: str) -> list[list[Any]]:
        return [[layer for layer in layers if name in layer.lora_A] for layers in self.layers]

    def _pairs(self, k: int, name: str) -> Iterator[tuple[Any, Tensor]]:
        """PEFT's parameters, and where they belong."""
        parameters = (
            module[name].weight for own in self._own(name) for layer in own for module in (layer.lora_A, layer.lora_B)
        )
        return zip(parameters, self.matrices(self.master_KS, k, name), strict=True)


def lora_layers(model: Any, name: str) -> dict[str, Any]:
    """PEFT's LoRA layers with an adapter of this name, by their paths."""
    return {path: layer for path, layer in model.named_modules() if name in getattr(layer, "lora_A", ())}


def _matrices(projections: list[list[Any]], views: list[Matrices], k: int, name: str) -> Iterator[Tensor]:
    for layers, matrices in zip(projections, views, strict=True):
        for i, layer in enumerate(layers):
            if name in layer.lora_A:
                yield matrices.a_KPRD[k, i, : layer.r[name]]
                yield matrices.b_KOR[i][k, :, : layer.r[name]]


def _sizes(projections: Sequence[Sequence[Any]]) -> list[tuple[int, list[int]]]:
    return [
        (layers[0].in_features if layers else 0, [layer.out_features for layer in layers]) for layers in projections
    ]


def _padded(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
