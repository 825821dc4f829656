"""AdamW over flat adapters: a handful of operations for all of them, none of which waits for the GPU.

K adapters, S numbers of each, F factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_lab.engine.adapter import Adapter

BETAS, EPS = (0.9, 0.999), 1e-8
"""transformers' defaults."""


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


class FlatAdamW:
    """Decoupled weight decay (arXiv 1711.05101) after clipping each adapter's gradient by its own norm."""

    def __init__(self, adapter: Adapter, *, compiled: bool) -> None:
        self.adapter = adapter
        self.m_KS, self.v_KS = (torch.zeros_like(adapter.master_KS) for _ in range(2))
        self.total_KS: Tensor | None = None
        """Where gradients are added up; not needed where every step is one micro-batch."""
        self.norm_K1 = adapter.master_KS.new_zeros(len(adapter.master_KS), 1)
        """Norms of the gradients of each adapter's last step, before clipping."""
        made: Callable[[Any], Any] = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
        self._step, self._add = made(_step), made(_add)

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
                buffers = (a.master_KS[:num], self.m_KS[:num], self.v_KS[:num], self.norm_K1[:num])
                self._step(*buffers, None if a.work_KS is a.master_KS else a.work_KS[:num], grad_KS, factors_KF)

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


def _step(
    master: Tensor, m: Tensor, v: Tensor, norm: Tensor, work: Tensor | None, grad: Tensor, factors_KF: Tensor
) -> None:
    # chosen and not multiplied by 0 or 1: what is not finite in one adapter, or unused in a slot, stays where it is
    _, steps, keep, rate, root, max_norm = factors_KF[:, :, None].unbind(dim=1)
    steps = steps > 0
    wide = grad.to(master.dtype)
    found = wide.square().sum(dim=1, keepdim=True).sqrt()
    wide = wide * (max_norm / (found + 1e-6)).clamp(max=1)
    new_m = torch.lerp(m, wide, 1 - BETAS[0])
    new_v = v * BETAS[1] + (1 - BETAS[1]) * wide * wide
    new = master * keep + rate * new_m / (new_v.sqrt() * root + EPS)
    norm.copy_(torch.where(steps, found, norm))
    m.copy_(torch.where(steps, new_m, m))
    v.copy_(torch.where(steps, new_v, v))
    master.copy_(torch.where(steps, new, master))
    if work is not None:
        work.copy_(master)
