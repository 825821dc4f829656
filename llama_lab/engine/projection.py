"""Frozen linear layers that share their input, and the LoRA on each, as one operation with a backward of its own.

PEFT computes ``W x + s B A dropout(x)`` (arXiv 2106.09685, equation 3) of each layer in a dozen autograd nodes, the
low-rank part in fp32. Here q, k and v, or gate and up, are one product with their weights one below the other, and so
are their A's. Everything runs in the compute type, as under autocast; the parameters stay PEFT's, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of a projection and the LoRA on it."""

    size: int
    """Outputs."""
    rank: int = 0
    """0 where the layer has no LoRA."""
    scale: float = 1.0
    dropout: float = 0.0
    """Probability with which an input of A is left out; 0 outside of training."""


class Project(torch.autograd.Function):
    """``y_i = W_i x + bias_i + s_i B_i A_i dropout_i(x)`` for all parts i, side by side."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *lora: Tensor
    ) -> Tensor:
        """
        Args:
            x: (N, in), of the weight's type.
            weight: (sum of sizes, in), frozen.
            bias: (sum of sizes,), frozen.
            lora: A (rank, in) of each part with a LoRA, then their B (size, rank).
        """
        adapted = [part for part in parts if part.rank]
        a = [matrix.to(x.dtype) for matrix in lora[: len(adapted)]]
        b = [matrix.to(x.dtype) for matrix in lora[len(adapted) :]]
        y = x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        masks = [_mask(x, part.dropout) for part in adapted if part.dropout]
        stacked = torch.cat(a)
        if masks:
            h = torch.cat([m.mm(matrix.t()) for m, matrix in zip(_inputs(x, adapted, masks), a, strict=True)], dim=1)
        else:
            h = x.mm(stacked.t())
        for part, place, low, matrix in _along(parts, h, b):
            y[:, place].addmm_(low, matrix.t(), alpha=part.scale)
        ctx.save_for_backward(x, weight, h, stacked, *b, *masks)
        ctx.parts, ctx.num_adapted = parts, len(adapted)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of each A and B; what is frozen has none."""
        x, weight, h, stacked, *rest = ctx.saved_tensors
        b, masks = rest[: ctx.num_adapted], rest[ctx.num_adapted :]
        adapted = [part for part in ctx.parts if part.rank]
        grad_h, grad_b = torch.empty_like(h), []
        ranks = grad_h.split([part.rank for part in adapted], dim=1)
        for (part, place, low, matrix), out in zip(_along(ctx.parts, h, b), ranks, strict=True):
            torch.mul(grad[:, place].mm(matrix), part.scale, out=out)
            grad_b.append(grad[:, place].t().mm(low).mul_(part.scale))
        grad_x = grad.mm(weight) if ctx.needs_input_grad[0] else None
        if masks:
            a = stacked.split([part.rank for part in adapted])
            dropped = _inputs(x, adapted, masks)
            grad_a = [g.t().mm(m) for g, m in zip(ranks, dropped, strict=True)]
            if grad_x is not None:
                through = [g.mm(matrix) for g, matrix in zip(ranks, a, strict=True)]
                for summand in _with_masks(through, adapted, masks):
                    grad_x.add_(summand)
        else:
            grad_a = list(grad_h.t().mm(x).split([part.rank for part in adapted]))
            if grad_x is not None:
                grad_x.addmm_(grad_h, stacked)
        return grad_x, None, None, None, *grad_a, *grad_b


def _along(parts: Sequence[Part], h: Tensor, b: Sequence[Tensor]) -> list[tuple[Part, slice, Tensor, Tensor]]:
    """(part, its outputs, its columns of h, its B) of each part with a LoRA."""
    found: list[tuple[Part, slice, Tensor, Tensor]] = []
    start = column = 0
    for part in parts:
        if part.rank:
            low = h[:, column : column + part.rank]
            found.append((part, slice(start, start + part.size), low, b[len(found)]))
            column += part.rank
        start += part.size
    return found


def _mask(x: Tensor, dropout: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)


def _inputs(x: Tensor, adapted: Sequence[Part], masks: Sequence[Tensor]) -> list[Tensor]:
    return _with_masks([x] * len(adapted), adapted, masks)


def _with_masks(tensors: Sequence[Tensor], adapted: Sequence[Part], masks: Sequence[Tensor]) -> list[Tensor]:
    left = iter(masks)
    return [
        (tensor * next(left)).mul_(1 / (1 - part.dropout)) if part.dropout else tensor
        for tensor, part in zip(tensors, adapted, strict=True)
    ]
