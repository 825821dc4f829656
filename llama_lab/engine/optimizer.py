"""AdamW over a flat adapter: a handful of operations, none of which waits for the GPU.

K adapters, S numbers of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_lab.config import TrainerSettings
from llama_lab.engine.adapter import Adapter

BETAS, EPS = (0.9, 0.999), 1e-8
"""transformers' defaults."""


class FlatAdamW:
    """Decoupled weight decay (arXiv 1711.05101) after clipping to trainer.max_grad_norm."""

    def __init__(self, adapter: Adapter, trainer: TrainerSettings, *, compiled: bool) -> None:
        self.adapter, self.decay, self.max_norm = adapter, trainer.weight_decay, trainer.max_grad_norm
        self.m_KS, self.v_KS = (torch.zeros_like(adapter.master_KS) for _ in range(2))
        self.norm_K1 = adapter.master_KS.new_zeros(len(adapter.master_KS), 1)
        """Norms of the last gradients, before clipping."""
        self._step: Callable[..., Any] = torch.compile(_step, fullgraph=True) if compiled else _step

    def step(self, number: int, learning_rate: float, grad_KS: Tensor) -> None:
        """The step of this number, counted from 1."""
        factors = torch.tensor(
            [
                1 - learning_rate * self.decay,
                -learning_rate / (1 - BETAS[0] ** number),
                1 / math.sqrt(1 - BETAS[1] ** number),
                self.max_norm,
            ],
            dtype=self.m_KS.dtype,
        )
        if grad_KS.is_cuda:
            factors = factors.pin_memory().to(grad_KS.device, non_blocking=True)
        a = self.adapter
        with torch.no_grad():
            self._step(a.master_KS, a.work_KS, self.m_KS, self.v_KS, grad_KS, self.norm_K1, factors)


def _step(master: Tensor, work: Tensor, m: Tensor, v: Tensor, grad: Tensor, norm: Tensor, factors: Tensor) -> None:
    keep, rate, root, max_norm = factors.unbind()
    wide = grad.to(master.dtype)
    norm.copy_(wide.square().sum(dim=1, keepdim=True).sqrt())
    wide = wide * (max_norm / (norm + 1e-6)).clamp(max=1)
    m.lerp_(wide, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(wide, wide, value=1 - BETAS[1])
    master.copy_(master * keep + rate * m / (v.sqrt() * root + EPS))
    if work is not master:
        work.copy_(master)
