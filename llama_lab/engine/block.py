"""A Llama block forward and backward, written out: what is kept, what is computed again, and in which order.

K adapters, P adapted layers, W words of a dropout key, N tokens of each adapter, D hidden size, E numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llama_lab.engine.adapted import Projection
from llama_lab.engine.entering import Gated, Normed, Plain
from llama_lab.engine.kernels import gate
from llama_lab.engine.pieces import Pieces
from llama_lab.engine.turned import Attended, Places, attend_turned


@dataclass(kw_only=True)
class Saved:
    """What a block keeps from forward to backward; only `x` where the rest is computed again."""

    x: Tensor
    """The residual stream that enters."""
    x_mlp: Tensor | None = None
    rstd: tuple[Tensor, ...] = ()
    """Of both norms."""
    attended: Attended | None = None
    """With all that attention needs to go back."""
    gate_up: Tensor | None = None
    low: tuple[Tensor | None, ...] = ()
    """The low-rank products of qkv, o, gate_up and down."""
    keys: tuple[Tensor | None, ...] = ()
    """Of dropout, of the same."""


@dataclass(kw_only=True)
class Step:
    """What all blocks of a micro-batch share."""

    places: Places
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
        saved, hidden = self._until_down(x, delta, step)
        down, low_down = self.down.forward(hidden, saved.keys[3])
        assert saved.x_mlp is not None
        stream = saved.x_mlp
        saved = Saved(x=saved.x) if self.recompute else replace(saved, low=(*saved.low, low_down))
        return saved, stream, down

    def backward(self, grad: Tensor, saved: Saved, step: Step, *, need_x: bool) -> Tensor | None:
        """Gradient of the stream that enters from that of the stream that leaves; those of A and B are written."""
        with self.gate_up.frozen.held() if self.recompute else nullcontext():
            if saved.attended is None:
                saved, hidden = self._until_down(saved.x, None, step)
                saved.low = (*saved.low, self.down.low(hidden, saved.keys[3]))
                del hidden
            grad = self._mlp_back(grad, saved)
        return self._attention_back(grad, saved, step, need_x=need_x)

    def _until_down(self, x: Tensor, delta: Tensor | None, step: Step) -> tuple[Saved, Tensor]:
        """All that backward needs, and what goes into the last projection."""
        keys = tuple(p.keys(step.keys_PKW) for p in (self.qkv, self.out, self.gate_up, self.down))
        x, into_qkv, rstd_qkv = self._enter("qkv", x, delta, self.norms[0])
        qkv, low_qkv = self.qkv.forward(into_qkv, keys[0])
        del into_qkv
        attended = attend_turned(self._heads(qkv), self.num_kv, self.scale, step.places)
        del qkv
        out, low_out = self.out.forward(attended.out.reshape(*x.shape[:2], -1), keys[1])
        x_mlp, into_mlp, rstd_mlp = self._enter("mlp", x, out, self.norms[1])
        del out
        gate_up, low_gate_up = self.gate_up.forward(into_mlp, keys[2])
        del into_mlp
        saved = Saved(
            x=x,
            x_mlp=x_mlp,
            rstd=(rstd_qkv, rstd_mlp),
            attended=attended,
            gate_up=gate_up,
            low=(low_qkv, low_out, low_gate_up),
            keys=keys,
        )
        return saved, gate(gate_up)

    def _mlp_back(self, grad: Tensor, saved: Saved) -> Tensor:
        low_gate_up, low_down = saved.low[2:]
        keys_mlp, keys_down = saved.keys[2:]
        gate_up, saved.gate_up = saved.gate_up, None
        assert gate_up is not None
        assert saved.x_mlp is not None
        grad_low = self.down.backward_low(grad, low_down)
        if grad_low is not None:
            self.down.backward_a(grad_low, Gated(gate_up=gate_up), keys_down)
        grad_gate_up = self.down.backward_gated(grad, grad_low, keys_down, gate_up)
        del gate_up
        entered = Normed(x=saved.x_mlp, weight=self.norms[1][0], rstd=saved.rstd[1])
        return self._branch_back(self.gate_up, grad_gate_up, low_gate_up, keys_mlp, entered, grad)

    def _attention_back(self, grad: Tensor, saved: Saved, step: Step, *, need_x: bool) -> Tensor | None:
        low_qkv, low_out = saved.low[:2]
        keys_qkv, keys_out = saved.keys[:2]
        attended, saved.attended = saved.attended, None
        assert attended is not None
        grad_low = self.out.backward_low(grad, low_out)
        if grad_low is not None:
            self.out.backward_a(grad_low, Plain(x=attended.out.reshape(*grad.shape[:2], -1)), keys_out)
        if not need_x and not self.qkv.num_adapted:
            return None
        grad_out = self.out.backward_x(grad, grad_low, keys_out)
        grad_qkv = attended.back(grad_out.view(attended.out.shape)).view(*grad.shape[:2], -1)
        del attended, grad_out
        entered = Normed(x=saved.x, weight=self.norms[0][0], rstd=saved.rstd[0])
        return self._branch_back(self.qkv, grad_qkv, low_qkv, keys_qkv, entered, grad, need_x=need_x)

    def _branch_back(
        self,
        projection: Projection,
        grad_out: Tensor,
        low: Tensor | None,
        keys_KPW: Tensor | None,
        entered: Normed,
        residual: Tensor,
        *,
        need_x: bool = True,
    ) -> Any:
        """Back through a projection and the norm before it."""
        grad_low = projection.backward_low(grad_out, low)
        if grad_low is not None:
            projection.backward_a(grad_low, entered, keys_KPW)
        if not need_x:
            return None
        grad_x = projection.backward_x(grad_out, grad_low, keys_KPW)
        return self.pieces("norm_back")(grad_x, entered.x, entered.weight, entered.rstd, residual)

    def _enter(self, name: str, x: Tensor, delta: Tensor | None, norm: Any) -> Any:
        """The residual stream, what a branch reads of it, and rstd."""
        return self.pieces("added_normed", name if delta is not None else f"{name}_again")(x, delta, *norm)

    def _heads(self, qkv: Tensor) -> Tensor:
        """(K N, heads of q, k and v, E)."""
        return qkv.view(-1, self.num_heads + 2 * self.num_kv, self.head_dim)
