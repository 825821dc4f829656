"""What a Llama block computes between its projections, each as one operation with a backward of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class RmsNorm(torch.autograd.Function):
    """``weight · x / sqrt(mean(x²) + eps)`` (arXiv 1910.07467) with a frozen weight, in fp32 as transformers does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., hidden)."""
        wide = x.to(_wide(x))
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = wide * rstd
        ctx.save_for_backward(normed, rstd, weight)
        return weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        normed, rstd, weight = ctx.saved_tensors
        wide = (grad * weight).to(normed.dtype)
        inner = (wide * normed).mean(-1, keepdim=True)
        return wide.addcmul(normed, inner, value=-1).mul_(rstd).to(grad.dtype), None, None


class SwiGlu(torch.autograd.Function):
    """``silu(gate) · up`` (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """gate_up: (..., 2 · intermediate), gate first."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Gradient of gate_up."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


class Rotate(torch.autograd.Function):
    """Rotary position embedding (arXiv 2104.09864) of queries and keys at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (..., head_dim); cos, sin: as many, 1 for heads; their two halves are the same."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x: turned back."""
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


class HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of ``softmax(hidden Wᵀ)`` with a frozen head W, without keeping logits.

    The gradient of the hidden states is computed on the way, a chunk of places at a time, as Liger-Kernel does
    (arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """
        Args:
            hidden: (N, hidden).
            weight: (V, hidden).
            targets: (N,) token ids.
            chunk: places whose (chunk, V) logits are there at once.
        """
        total = hidden.new_zeros((), dtype=_wide(hidden))
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = part.mm(weight.t()).to(total.dtype)
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            chosen = logits.gather(1, wanted)
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if grads is not None:
                error = logits.div_(sums)  # softmax - onehot
                error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1.0))
                grads[start : start + chunk] = error.to(hidden.dtype).mm(weight)
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of hidden."""
        return ctx.saved_tensors[0] * grad.to(ctx.saved_tensors[0].dtype), None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
