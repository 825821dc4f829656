"""A Llama block forward and backward, written out: what is kept, what is computed again, and in which order.

K adapters, P adapted layers, W words of a dropout key, N tokens of each adapter, R rank, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama_lab.engine.adapted import IntoA, Projection
from llama_lab.engine.kernels import gate_back
from llama_lab.engine.pieces import Pieces
from llama_lab.engine.rows import RowBounds, attend


@dataclass(kw_only=True)
class Saved:
    """What a block keeps from forward to backward; only `x` where the rest is computed again."""

    x: Tensor
    """The residual stream that enters."""
    x_mlp: Tensor | None = None
    qkv: tuple[Tensor, Tensor, Tensor] | None = None
    attended: Tensor | None = None
    """With the graph of attention behind it."""
    gate_up: Tensor | None = None
    low: tuple[Tensor | None, ...] = ()
    """The low-rank products of qkv, o, gate_up and down."""
    keys: tuple[Tensor | None, ...] = ()
    """Of dropout, of the same."""


@dataclass(kw_only=True)
class Step:
    """What all blocks of a micro-batch share."""

    cos_NE: Tensor
    sin_NE: Tensor
    rows: RowBounds
    keys_PKW: Tensor
    """Dropout keys of the adapted layers of all blocks."""


class Block:
    """One decoder block; its weights are looked up, never kept."""

    def __init__(self, layer: Any, projections: Sequence[Projection], pieces: Pieces, *, recompute: bool) -> None:
        self.qkv, self.out, self.gate_up, self.down = projections
        self.norms = [
            (n.weight.data, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        attention = layer.self_attn
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.num_kv = attention.config.num_key_value_heads
        self.num_heads = attention.config.num_attention_heads
        self.pieces, self.recompute = pieces, recompute

    @property
    def is_adapted(self) -> bool:
        return any(p.num_adapted for p in (self.qkv, self.out, self.gate_up, self.down))

    def forward(self, x: Tensor, delta: Tensor | None, step: Step) -> tuple[Saved, Tensor, Tensor]:
        """What is kept for backward, the residual stream before the MLP, and what the MLP adds to it.

        Args:
            x: (K, N, D) residual stream before the last addition.
            delta: that addition; None where there is none.
        """
        saved, hidden, into_a = self._until_down(x, delta, step)
        down, low_down = self.down.forward(hidden, into_a)
        assert saved.x_mlp is not None
        stream = saved.x_mlp
        saved = Saved(x=saved.x) if self.recompute else replace(saved, low=(*saved.low, low_down))
        return saved, stream, down

    def backward(self, grad: Tensor, saved: Saved, step: Step, *, need_x: bool) -> Tensor | None:
        """Gradient of the stream that enters from that of the stream that leaves; those of A and B are written."""
        with self.gate_up.frozen.held() if self.recompute else nullcontext():
            if saved.attended is None:
                saved, hidden, into_a = self._until_down(saved.x, None, step)
                saved.low = (*saved.low, self.down.low(hidden, into_a))
                del hidden, into_a
            grad = self._mlp_back(grad, saved)
        return self._attention_back(grad, saved, step, need_x=need_x)

    def _until_down(self, x: Tensor, delta: Tensor | None, step: Step) -> tuple[Saved, Tensor, IntoA]:
        """All that backward needs, and what goes into the last projection and its A."""
        keys_qkv = self.qkv.keys(step.keys_PKW)
        x, into_qkv, into_a = self._enter("qkv", self.qkv, x, delta, self.norms[0], keys_qkv)
        qkv, low_qkv = self.qkv.forward(into_qkv, into_a)
        del into_qkv, into_a
        heads = self._turn(qkv, step)
        del qkv
        with torch.enable_grad():
            q, k, v = (part.detach().requires_grad_() for part in heads)
            attended = attend(q, k, v, step.rows, self.scale)
        del heads
        flat = attended.detach().reshape(*x.shape[:2], -1)
        keys_out = self.out.keys(step.keys_PKW)
        out, low_out = self.out.forward(flat, self._dropped("out", self.out, flat, keys_out))
        keys_mlp = self.gate_up.keys(step.keys_PKW)
        x_mlp, into_mlp, into_a = self._enter("mlp", self.gate_up, x, out, self.norms[1], keys_mlp)
        del out, flat
        gate_up, low_gate_up = self.gate_up.forward(into_mlp, into_a)
        del into_mlp, into_a
        hidden, into_a, keys_down = self._gate(gate_up, step)
        saved = Saved(
            x=x,
            x_mlp=x_mlp,
            qkv=(q, k, v),
            attended=attended,
            gate_up=gate_up,
            low=(low_qkv, low_out, low_gate_up),
            keys=(keys_qkv, keys_out, keys_mlp, keys_down),
        )
        return saved, hidden, into_a

    def _mlp_back(self, grad: Tensor, saved: Saved) -> Tensor:
        low_gate_up, low_down = saved.low[2:]
        keys_mlp, keys_down = saved.keys[2:]
        gate_up, saved.gate_up = saved.gate_up, None
        assert gate_up is not None
        assert saved.x_mlp is not None
        grad_low = self.down.backward_low(grad, low_down)
        if grad_low is not None:
            hidden, into_a, _ = self._gate_again(gate_up, keys_down)
            self.down.backward_a(grad_low, hidden, into_a)
            del hidden, into_a
        grad_gate_up = gate_back(self.down.backward_x(grad, grad_low, keys_down), gate_up)
        del gate_up
        return self._branch_back("mlp", self.gate_up, grad_gate_up, low_gate_up, keys_mlp, saved.x_mlp, 1, grad)

    def _attention_back(self, grad: Tensor, saved: Saved, step: Step, *, need_x: bool) -> Tensor | None:
        low_qkv, low_out = saved.low[:2]
        keys_qkv, keys_out = saved.keys[:2]
        assert saved.attended is not None
        assert saved.qkv is not None
        grad_low = self.out.backward_low(grad, low_out)
        if grad_low is not None:
            flat = saved.attended.detach().reshape(*grad.shape[:2], -1)
            into_a = self._dropped("out", self.out, flat, keys_out)
            self.out.backward_a(grad_low, flat, into_a)
            del flat, into_a
        if not need_x and not self.qkv.num_adapted:
            return None
        grad_flat = self.out.backward_x(grad, grad_low, keys_out)
        grads = torch.autograd.grad(saved.attended, saved.qkv, grad_flat.view(saved.attended.shape))
        saved.attended = saved.qkv = None
        grad_qkv = self._turn_back(grads, step).view(*grad.shape[:2], -1)
        return self._branch_back("qkv", self.qkv, grad_qkv, low_qkv, keys_qkv, saved.x, 0, grad, need_x=need_x)

    def _branch_back(
        self,
        name: str,
        projection: Projection,
        grad_out: Tensor,
        low: Tensor | None,
        keys_KPW: Tensor | None,
        x: Tensor,
        norm: int,
        residual: Tensor,
        *,
        need_x: bool = True,
    ) -> Any:
        """Back through a projection and the norm before it."""
        weight, eps = self.norms[norm]
        grad_low = projection.backward_low(grad_out, low)
        if grad_low is not None and keys_KPW is None:
            projection.backward_a(grad_low, self.pieces("normed")(x, weight, eps), None)
        elif grad_low is not None:
            again = self.pieces("normed_dropped", name)
            projection.backward_a(grad_low, None, again(x, weight, eps, keys_KPW))
        if not need_x:
            return None
        grad_x = projection.backward_x(grad_out, grad_low, keys_KPW)
        return self.pieces("norm_back")(grad_x, x, weight, eps, residual)

    def _enter(
        self, name: str, projection: Projection, x: Tensor, delta: Tensor | None, norm: Any, keys_KPW: Tensor | None
    ) -> tuple[Tensor, Tensor, IntoA]:
        place = name if delta is not None else f"{name}_again"
        if keys_KPW is None:
            return *self.pieces("added_normed", place)(x, delta, *norm), None
        return self.pieces("added_normed_dropped", place)(x, delta, *norm, keys_KPW)

    def _dropped(self, name: str, projection: Projection, x: Tensor, keys_KPW: Tensor | None) -> IntoA:
        return None if keys_KPW is None else self.pieces("dropped", name)(x, keys_KPW)

    def _gate(self, gate_up: Tensor, step: Step) -> tuple[Tensor, IntoA, Tensor | None]:
        keys_KPW = self.down.keys(step.keys_PKW)
        return self._gate_again(gate_up, keys_KPW)

    def _gate_again(self, gate_up: Tensor, keys_KPW: Tensor | None) -> tuple[Tensor, IntoA, Tensor | None]:
        if keys_KPW is None:
            return self.pieces("gated")(gate_up), None, None
        return *self.pieces("gated_dropped")(gate_up, keys_KPW), keys_KPW

    def _turn(self, qkv: Tensor, step: Step) -> list[Tensor]:
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv, self.head_dim)
        turned = self.pieces("turned")(heads, step.cos_NE, step.sin_NE, self.num_heads + self.num_kv)
        return list(turned.split([self.num_heads, self.num_kv, self.num_kv], dim=1))

    def _turn_back(self, grads: Sequence[Tensor], step: Step) -> Tensor:
        """(N, heads of q, k and v, E)."""
        heads = [self.num_heads, self.num_kv, self.num_kv]
        out = grads[0].new_empty(len(grads[0]), sum(heads), self.head_dim)
        q, k, v = out.split(heads, dim=1)
        self.pieces("turned_back", "q")(q, grads[0], step.cos_NE, step.sin_NE)
        self.pieces("turned_back", "k")(k, grads[1], step.cos_NE, step.sin_NE)
        v.copy_(grads[2])
        return out
