"""A Llama block forward and backward, written out: what is kept, what is computed again, and in which order.

K adapters, P adapted layers of a projection, N tokens of each adapter, R rank, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama_lab.engine.adapter import Matrices
from llama_lab.engine.dropout import drawn
from llama_lab.engine.frozen import Frozen
from llama_lab.engine.pieces import Pieces
from llama_lab.engine.rows import RowBounds, attend

IntoA = list[Tensor] | None
"""(K, N, D) for each adapted layer of a projection; None where all read the input as it is."""


@dataclass(kw_only=True)
class Projection:
    """Linear layers that share their input: ``W x``, and ``s B A dropout(x)`` on those that are adapted."""

    frozen: Frozen
    places: list[slice]
    """The outputs of each adapted layer."""
    share: float
    """Dropout."""
    scale_K: Tensor
    keys: slice
    """Its adapted layers in the keys of a step."""
    work: Matrices
    grad: Matrices

    @property
    def num_adapted(self) -> int:
        return len(self.places)

    def draw(self, keys: Tensor, x_KND: Tensor) -> Tensor | None:
        """What decides about the dropout of this micro-batch; None where nothing is left out."""
        if not self.share or not self.num_adapted:
            return None
        num_adapters, num_tokens, width = x_KND.shape
        keys_KPW = keys[self.keys].view(self.num_adapted, num_adapters, -1).transpose(0, 1)
        return drawn(keys_KPW, num_tokens, width, self.share)

    def forward(self, x_KND: Tensor, into_a: IntoA) -> tuple[Tensor, Tensor | None]:
        """(K, N, all O) and the low-rank products (K, P, N, R).

        Args:
            into_a: what goes into the A of each layer where there is dropout; None where that is x.
        """
        y_KNO = (x_KND.flatten(0, 1) @ self.frozen.weight().t()).unflatten(0, x_KND.shape[:2])
        low_KPNR = self.low(x_KND, into_a)
        if low_KPNR is not None:
            for i, place in enumerate(self.places):
                y_KNO[..., place].baddbmm_(low_KPNR[:, i], self.work.b_KOR[i].transpose(1, 2))
        return y_KNO, low_KPNR

    def low(self, x_KND: Tensor, into_a: IntoA) -> Tensor | None:
        """``s A dropout(x)`` of each adapted layer."""
        if not self.num_adapted:
            return None
        a_KPRD = self.work.a_KPRD
        if into_a is None:
            low = torch.bmm(x_KND, a_KPRD.flatten(1, 2).transpose(1, 2))
            low_KPNR = low.unflatten(2, a_KPRD.shape[1:3]).transpose(1, 2)
        else:
            low_KPNR = x_KND.new_empty(len(x_KND), self.num_adapted, x_KND.shape[1], a_KPRD.shape[2])
            for i, x_i in enumerate(into_a):
                _product(x_i, a_KPRD[:, i].transpose(1, 2), out=low_KPNR[:, i])
        return low_KPNR.mul_(self.scale_K[:, None, None, None])

    def backward_low(self, grad_KNO: Tensor, low_KPNR: Tensor | None) -> Tensor | None:
        """Gradients of B, written where they belong; that of the low-rank products is returned."""
        if low_KPNR is None:
            return None
        grad_low = torch.empty(low_KPNR.shape, dtype=low_KPNR.dtype, device=low_KPNR.device)
        for i, place in enumerate(self.places):
            grad_i = grad_KNO[..., place]
            _product(grad_i.transpose(1, 2), low_KPNR[:, i], out=self.grad.b_KOR[i])
            _product(grad_i, self.work.b_KOR[i], out=grad_low[:, i])
        return grad_low.mul_(self.scale_K[:, None, None, None])

    def backward_a(self, grad_low_KPNR: Tensor, x_KND: Tensor | None, into_a: IntoA) -> None:
        """Gradient of A."""
        grad_a = self.grad.a_KPRD
        if into_a is None:
            assert x_KND is not None
            low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)  # (K, N, P R)
            grad_a.copy_(torch.bmm(low.transpose(1, 2), x_KND).unflatten(1, grad_a.shape[1:3]))
            return
        for i, x_i in enumerate(into_a):
            _product(grad_low_KPNR[:, i].transpose(1, 2), x_i, out=grad_a[:, i])

    def backward_x(
        self, grad_KNO: Tensor, grad_low_KPNR: Tensor | None, *, dropout: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Gradient of x through the base, and what comes through each A, which dropout has still to pass."""
        grad_KND = (grad_KNO.flatten(0, 1) @ self.frozen.weight()).unflatten(0, grad_KNO.shape[:2])
        if grad_low_KPNR is None:
            return grad_KND, None
        a_KPRD = self.work.a_KPRD
        if dropout:
            return grad_KND, [torch.bmm(grad_low_KPNR[:, i], a_KPRD[:, i]) for i in range(self.num_adapted)]
        low = grad_low_KPNR.transpose(1, 2).flatten(2, 3)
        return grad_KND.baddbmm_(low, a_KPRD.flatten(1, 2)), None


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
    drawn: tuple[Tensor | None, ...] = ()
    """Of the same."""


@dataclass(kw_only=True)
class Step:
    """What all blocks of a micro-batch share."""

    cos_NE: Tensor
    sin_NE: Tensor
    rows: RowBounds
    keys: Tensor
    """(adapted layers of all blocks x K, KEY_WORDS)."""


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
        if saved.attended is None:
            saved, hidden, into_a = self._until_down(saved.x, None, step)
            saved.low = (*saved.low, self.down.low(hidden, into_a))
            del hidden, into_a
        grad = self._mlp_back(grad, saved)
        return self._attention_back(grad, saved, step, need_x=need_x)

    def _until_down(self, x: Tensor, delta: Tensor | None, step: Step) -> tuple[Saved, Tensor, IntoA]:
        """All that backward needs, and what goes into the last projection and its A."""
        drawn_qkv = self.qkv.draw(step.keys, x)
        x, into_qkv, into_a = self._enter("qkv", self.qkv, x, delta, self.norms[0], drawn_qkv)
        qkv, low_qkv = self.qkv.forward(into_qkv, into_a)
        del into_qkv, into_a
        heads = self._turn(qkv, step)
        del qkv
        with torch.enable_grad():
            q, k, v = (part.detach().requires_grad_() for part in heads)
            attended = attend(q, k, v, step.rows, self.scale)
        del heads
        flat = attended.detach().reshape(*x.shape[:2], -1)
        drawn_out = self.out.draw(step.keys, flat)
        out, low_out = self.out.forward(flat, self._dropped("out", self.out, flat, drawn_out))
        drawn_mlp = self.gate_up.draw(step.keys, x)
        x_mlp, into_mlp, into_a = self._enter("mlp", self.gate_up, x, out, self.norms[1], drawn_mlp)
        del out, flat
        gate_up, low_gate_up = self.gate_up.forward(into_mlp, into_a)
        del into_mlp, into_a
        hidden, into_a, drawn_down = self._gate(gate_up, step)
        saved = Saved(
            x=x,
            x_mlp=x_mlp,
            qkv=(q, k, v),
            attended=attended,
            gate_up=gate_up,
            low=(low_qkv, low_out, low_gate_up),
            drawn=(drawn_qkv, drawn_out, drawn_mlp, drawn_down),
        )
        return saved, hidden, into_a

    def _mlp_back(self, grad: Tensor, saved: Saved) -> Tensor:
        low_gate_up, low_down = saved.low[2:]
        drawn_mlp, drawn_down = saved.drawn[2:]
        gate_up, saved.gate_up = saved.gate_up, None
        assert gate_up is not None
        assert saved.x_mlp is not None
        grad_low = self.down.backward_low(grad, low_down)
        if grad_low is not None:
            hidden, into_a, _ = self._gate_again(gate_up, drawn_down)
            self.down.backward_a(grad_low, hidden, into_a)
            del hidden, into_a
        grad_hidden, through = self.down.backward_x(grad, grad_low, dropout=drawn_down is not None)
        grad_gate_up = self._gate_back(grad_hidden, through, drawn_down, gate_up)
        del grad_hidden, through, gate_up
        return self._branch_back("mlp", self.gate_up, grad_gate_up, low_gate_up, drawn_mlp, saved.x_mlp, 1, grad)

    def _attention_back(self, grad: Tensor, saved: Saved, step: Step, *, need_x: bool) -> Tensor | None:
        low_qkv, low_out = saved.low[:2]
        drawn_qkv, drawn_out = saved.drawn[:2]
        assert saved.attended is not None
        assert saved.qkv is not None
        grad_low = self.out.backward_low(grad, low_out)
        if grad_low is not None:
            flat = saved.attended.detach().reshape(*grad.shape[:2], -1)
            into_a = self._dropped("out", self.out, flat, drawn_out)
            self.out.backward_a(grad_low, flat, into_a)
            del flat, into_a
        if not need_x and not self.qkv.num_adapted:
            return None
        grad_flat, through = self.out.backward_x(grad, grad_low, dropout=drawn_out is not None)
        if through is not None:
            grad_flat = self.pieces("undropped", "out")(grad_flat, through, drawn_out, self.out.share)
        grads = torch.autograd.grad(saved.attended, saved.qkv, grad_flat.view(saved.attended.shape))
        saved.attended = saved.qkv = None
        turned = self.pieces("turned_back")(*grads, step.cos_NE, step.sin_NE)
        grad_qkv = turned.view(*grad.shape[:2], -1)
        return self._branch_back("qkv", self.qkv, grad_qkv, low_qkv, drawn_qkv, saved.x, 0, grad, need_x=need_x)

    def _branch_back(
        self,
        name: str,
        projection: Projection,
        grad_out: Tensor,
        low: Tensor | None,
        drawn_KP: Tensor | None,
        x: Tensor,
        norm: int,
        residual: Tensor,
        *,
        need_x: bool = True,
    ) -> Any:
        """Back through a projection and the norm before it."""
        weight, eps = self.norms[norm]
        grad_low = projection.backward_low(grad_out, low)
        if grad_low is not None and drawn_KP is None:
            projection.backward_a(grad_low, self.pieces("normed")(x, weight, eps), None)
        elif grad_low is not None:
            again = self.pieces("normed_dropped", name)
            projection.backward_a(grad_low, None, again(x, weight, eps, drawn_KP, projection.share))
        if not need_x:
            return None
        grad_x, through = projection.backward_x(grad_out, grad_low, dropout=drawn_KP is not None)
        if through is None:
            return self.pieces("norm_back")(grad_x, x, weight, eps, residual)
        back = self.pieces("undropped_norm_back", name)
        return back(grad_x, through, drawn_KP, projection.share, x, weight, eps, residual)

    def _enter(
        self, name: str, projection: Projection, x: Tensor, delta: Tensor | None, norm: Any, drawn_KP: Tensor | None
    ) -> tuple[Tensor, Tensor, IntoA]:
        place = name if delta is not None else f"{name}_again"
        if drawn_KP is None:
            return *self.pieces("added_normed", place)(x, delta, *norm), None
        return self.pieces("added_normed_dropped", place)(x, delta, *norm, drawn_KP, projection.share)

    def _dropped(self, name: str, projection: Projection, x: Tensor, drawn_KP: Tensor | None) -> IntoA:
        return None if drawn_KP is None else self.pieces("dropped", name)(x, drawn_KP, projection.share)

    def _gate(self, gate_up: Tensor, step: Step) -> tuple[Tensor, IntoA, Tensor | None]:
        drawn_KP = self.down.draw(step.keys, gate_up[..., : gate_up.shape[-1] // 2])
        return self._gate_again(gate_up, drawn_KP)

    def _gate_again(self, gate_up: Tensor, drawn_KP: Tensor | None) -> tuple[Tensor, IntoA, Tensor | None]:
        if drawn_KP is None:
            return self.pieces("gated")(gate_up), None, None
        return *self.pieces("gated_dropped")(gate_up, drawn_KP, self.down.share), drawn_KP

    def _gate_back(
        self, grad: Tensor, through: list[Tensor] | None, drawn_KP: Tensor | None, gate_up: Tensor
    ) -> Tensor:
        if through is None:
            return self.pieces("gate_back")(grad, gate_up)
        return self.pieces("undropped_gate_back")(grad, through, drawn_KP, self.down.share, gate_up)

    def _turn(self, qkv: Tensor, step: Step) -> list[Tensor]:
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv, self.head_dim)
        turned = self.pieces("turned")(heads, step.cos_NE, step.sin_NE, self.num_heads + self.num_kv)
        return list(turned.split([self.num_heads, self.num_kv, self.num_kv], dim=1))


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Matrix products of K pairs into `out`, which may lie apart."""
    if out.is_contiguous():
        torch.bmm(x, y, out=out)
    else:
        out.copy_(torch.bmm(x, y))
