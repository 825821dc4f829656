"""AdamW over flat adapters: a handful of operations for all of them, none of which waits for the GPU.

K adapters, S numbers of each in T tiles, F factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama_lab.engine.adapter import Adapter

BETAS, EPS = (0.9, 0.999), 1e-8
"""transformers' defaults."""
TILE = 1024
"""Numbers that a program of a GPU updates at once."""


@dataclass(kw_only=True)
class Update:
    """What the optimizer does with one adapter after a micro-batch."""

    is_first: bool
    """The gradient begins a new sum; else it is added to that of the micro-batches before."""
    number: int | None
    """The step to be taken, counted from 1; None where more micro-batches belong to it."""
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    max_norm: float = 1.0

    def factors(self) -> list[float]:
        """What the operations on the device take: numbers alone, so that each adapter may have its own."""
        if self.number is None:
            return [float(self.is_first), 0.0, 1.0, 0.0, 1.0, 1.0]
        return [
            float(self.is_first),
            1.0,
            1 - self.learning_rate * self.weight_decay,
            -self.learning_rate / (1 - BETAS[0] ** self.number),
            1 / math.sqrt(1 - BETAS[1] ** self.number),
            self.max_norm,
        ]


NOTHING = Update(is_first=True, number=None)
"""For an empty slot."""


@dataclass(kw_only=True)
class Used:
    """Which numbers of a flat buffer belong to an adapter, and which pad it to the largest rank."""

    rank_S: Tensor
    """Rank index of each number."""
    least_T: Tensor
    """The smallest of each `TILE`: one that is all padding is left after this one look."""
    rank_K: Tensor
    """Rank of each adapter."""

    @classmethod
    def of(cls, rank_S: Tensor, rank_K: Tensor) -> Used:
        """Of what `Layout.rank_indices` says."""
        whole_tiles = pad(rank_S, (0, -len(rank_S) % TILE), value=torch.iinfo(rank_S.dtype).max)
        return cls(rank_S=rank_S, least_T=whole_tiles.view(-1, TILE).amin(dim=1), rank_K=rank_K)


class FlatAdamW:
    """Decoupled weight decay (arXiv 1711.05101) after clipping each adapter's gradient by its own norm."""

    def __init__(self, adapter: Adapter, *, compiled: bool) -> None:
        self.adapter = adapter
        self.m_KS, self.v_KS = (torch.zeros_like(adapter.master_KS) for _ in range(2))
        self.total_KS: Tensor | None = None
        """Where gradients are added up; not needed where every step is one micro-batch."""
        self.norm_K1 = adapter.master_KS.new_zeros(len(adapter.master_KS), 1)
        """Norms of the gradients of each adapter's last step, before clipping."""
        self.used: Used | None = None
        """What is padding is not read on a GPU."""
        if len(adapter.master_KS) > 1 and adapter.master_KS.is_cuda:
            self.used = Used.of(adapter.layout.rank_indices(adapter.master_KS.device), adapter.rank_K)
        made: Callable[[Any], Any] = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
        self._norms, self._add = made(_norms), made(_add)

    def add_up(self) -> None:
        """From now on steps may have several micro-batches."""
        if self.total_KS is None:
            self.total_KS = torch.zeros_like(self.adapter.master_KS)

    def step(self, updates: Sequence[Update]) -> None:
        """The gradients of the last micro-batches of the first adapters, one update for each."""
        a, num = self.adapter, len(updates)
        factors_KF = torch.tensor([update.factors() for update in updates], dtype=self.m_KS.dtype)
        if a.grad_KS.is_cuda:
            factors_KF = factors_KF.pin_memory().to(a.grad_KS.device, non_blocking=True)
        grad_KS = a.grad_KS[:num]
        with torch.no_grad():
            if self.total_KS is not None:
                self._add(self.total_KS[:num], grad_KS, factors_KF)
                grad_KS = self.total_KS[:num]
            if any(update.number is not None for update in updates):
                self._norms(self.norm_K1[:num], grad_KS, factors_KF)
                master_KS = a.master_KS[:num]
                work_KS = master_KS if a.work_KS is a.master_KS else a.work_KS[:num]
                buffers = (master_KS, self.m_KS[:num], self.v_KS[:num], self.norm_K1[:num])
                adamw(buffers, work_KS, grad_KS, factors_KF, self.used)

    def clear(self, k: int) -> None:
        """An adapter without a step so far."""
        for buffer in self._buffers():
            buffer[k].zero_()

    def move(self, start: int, end: int) -> None:
        """From one slot into an empty one."""
        for buffer in self._buffers():
            buffer[end].copy_(buffer[start])
        self.clear(start)

    def _buffers(self) -> list[Tensor]:
        found = [self.m_KS, self.v_KS, self.norm_K1]
        return found if self.total_KS is None else [*found, self.total_KS]


def _add(total_KS: Tensor, grad_KS: Tensor, factors_KF: Tensor) -> None:
    wide = grad_KS.to(total_KS.dtype)
    total_KS.copy_(torch.where(factors_KF[:, :1] > 0, wide, total_KS + wide))


def _norms(norm_K1: Tensor, grad_KS: Tensor, factors_KF: Tensor) -> None:
    found = grad_KS.to(norm_K1.dtype).square().sum(dim=1, keepdim=True).sqrt()
    norm_K1.copy_(torch.where(factors_KF[:, 1:2] > 0, found, norm_K1))


def adamw(buffers: Sequence[Tensor], work_KS: Tensor, grad_KS: Tensor, factors_KF: Tensor, used: Used | None) -> None:
    """One update of masters and moments, and the masters' copy in the compute type; on a GPU by a kernel of its own.

    Args:
        buffers: masters, first and second moments, and the norms (K, 1) of the gradients.
        factors_KF: `Update.factors` of each adapter.
        used: `FlatAdamW.used`.
    """
    if grad_KS.is_cuda:
        from llama_lab.engine import triton_kernels

        triton_kernels.adamw(buffers, work_KS, grad_KS, factors_KF, used)
        return
    master, m, v, norm = buffers
    # chosen and not multiplied by 0 or 1: what is not finite in one adapter, or unused in a slot, stays where it is
    _, steps, keep, rate, root, max_norm = factors_KF[:, :, None].unbind(dim=1)
    steps = steps > 0
    wide = grad_KS.to(master.dtype) * (max_norm / (norm + 1e-6)).clamp(max=1)
    new_m = torch.lerp(m, wide, 1 - BETAS[0])
    new_v = v * BETAS[1] + (1 - BETAS[1]) * wide * wide
    new = master * keep + rate * new_m / (new_v.sqrt() * root + EPS)
    m.copy_(torch.where(steps, new_m, m))
    v.copy_(torch.where(steps, new_v, v))
    master.copy_(torch.where(steps, new, master))
    if work_KS is not master:
        work_KS.copy_(master)
