"""A whole Llama with LoRA, forward and backward without autograd: embedding, blocks, head and loss.

K adapters, P adapted layers, W words of a dropout key, N tokens of each adapter, D hidden size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_lab.choices import Memory
from llama_lab.engine.adapted import Projection
from llama_lab.engine.adapter import Adapter
from llama_lab.engine.block import Block, Saved, Step
from llama_lab.engine.frozen import Frozen, base_of
from llama_lab.engine.pieces import Pieces, pieces_for
from llama_lab.engine.rows import RowBounds
from llama_lab.engine.turned import places_of
from llama_lab.fast_memory import HEAD_CHUNK


@dataclass(kw_only=True)
class Inputs:
    """A micro-batch on the device: rows of every adapter one behind the other."""

    tokens_3KN: Tensor
    """Ids; the token after each, IGNORED where nothing is learned; positions, from 0 in each row."""
    rows: RowBounds
    """Of all K x N places."""
    keys_PKW: Tensor
    """int32: a dropout key for each adapted layer of all blocks."""
    share_K: Tensor
    """What one learned token counts in the loss: 1 / learned tokens of the step."""
    losses_K: Tensor
    """To which the losses are added."""


class Network:
    """Computes losses, and the gradients of the adapter, of a PEFT model that `choose.unsuited_model` lets through."""

    def __init__(self, model: Any, memory: Memory, *, num_rows: int, rank: int, dropout: bool, compiled: bool) -> None:
        """
        Args:
            model: its LoRA layers are those of all adapters that are ever taken in.
            num_rows: adapters trained at once.
            rank: no adapter has a larger one.
            dropout: whether any of them may have dropout.
        """
        causal = model.get_base_model()
        inner = causal.model
        self.embedding, self.rotary = inner.embed_tokens.weight.data, inner.rotary_emb
        self.head, self.norm = causal.lm_head.weight.data, (inner.norm.weight.data, inner.norm.variance_epsilon)
        self.pieces, self.dropout = self._pieces(causal.config, num_rows, compiled), dropout
        groups = [group for layer in inner.layers for group in projections_of(layer)]
        self.lora = [[layer for layer in group if layer is not base_of(layer)] for group in groups]
        self.adapter = Adapter(
            self.lora, num_rows=num_rows, rank=rank, dtype=self.embedding.dtype, device=self.embedding.device
        )
        self.blocks = self._blocks(inner.layers, groups, memory)
        self.first_adapted = next(i for i, block in enumerate(self.blocks) if block.is_adapted)

    def _pieces(self, config: Any, num_rows: int, compiled: bool) -> Pieces:
        """Of a stack those of the one before, where that had the same sizes: what was compiled for it is there."""
        if not compiled or num_rows == 1:
            return Pieces(compiled=compiled)
        head = (*self.head.shape, self.norm[1], self.head.dtype, self.head.device)
        return pieces_for((*head, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads))

    @property
    def num_keys(self) -> int:
        """Adapted layers: each has a dropout key."""
        return sum(map(len, self.lora))

    def forward_backward(self, inputs: Inputs) -> None:
        """Add the losses to `inputs.losses_K` and write the gradients of the adapter."""
        with torch.no_grad():
            ids_KN, _, positions_KN = inputs.tokens_3KN
            x, delta = nn.functional.embedding(ids_KN, self.embedding), None
            cos, sin = self.rotary(x, positions_KN.view(1, -1))
            places = places_of(inputs.rows, cos[0], sin[0], len(ids_KN))
            step = Step(places=places, keys_PKW=inputs.keys_PKW)
            kept: list[Saved] = []
            for block in self.blocks:
                saved, x, delta = block.forward(x, delta, step)
                kept.append(saved)
            grad: Tensor | None = self._head(x, delta, inputs)
            del x, delta, saved
            for i in range(len(self.blocks) - 1, self.first_adapted - 1, -1):
                assert grad is not None
                grad = self.blocks[i].backward(grad, kept.pop(), step, need_x=i > self.first_adapted)

    def _head(self, x: Tensor, delta: Tensor | None, inputs: Inputs) -> Tensor:
        """The losses, and the gradient of the residual stream behind the last block."""
        x, hidden_KND, rstd = self.pieces("added_normed", "head")(x, delta, *self.norm)
        hidden, targets = hidden_KND.flatten(0, 1), inputs.tokens_3KN[1].flatten()
        num_adapters, num_tokens = inputs.tokens_3KN.shape[1:]
        # of one adapter `expand` alone would be a view, and a new case for the compiler
        shares = inputs.share_K[:, None].expand(-1, num_tokens).contiguous().view(-1)
        grad, losses = torch.empty_like(hidden), []
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            logits = hidden[part] @ self.head.t()
            loss, error = self.pieces("head_error")(logits, targets[part], shares[part])
            del logits
            torch.mm(error, self.head, out=grad[part])
            losses.append(loss)
        inputs.losses_K += torch.cat(losses).view(num_adapters, -1).sum(dim=1)
        return self.pieces("norm_back", "head")(grad.view(x.shape), x, self.norm[0], rstd, None)

    def _blocks(self, layers: Any, groups: list[list[Any]], memory: Memory) -> list[Block]:
        adapter = self.adapter
        work, grad = adapter.layout.views(adapter.work_KS), adapter.layout.views(adapter.grad_KS)
        made, start = [], 0
        for i, (group, adapted) in enumerate(zip(groups, self.lora, strict=True)):
            made.append(
                Projection(
                    frozen=Frozen(group, self.pieces, keep=memory is Memory.fast),
                    places=_places(group),
                    dropout=self.dropout,
                    scale_K=adapter.scale_PK[i],
                    adapted=slice(start, start + len(adapted)),
                    work=work[i],
                    grad=grad[i],
                )
            )
            start += len(adapted)
        recompute = memory is Memory.lean
        return [
            Block(layer, made[4 * i : 4 * i + 4], self.pieces, recompute=recompute) for i, layer in enumerate(layers)
        ]


def projections_of(layer: Any) -> list[list[Any]]:
    """The linear layers of a block by the input that they share."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _places(group: list[Any]) -> list[slice]:
    places, start = [], 0
    for layer in group:
        size = base_of(layer).out_features
        if layer is not base_of(layer):
            places.append(slice(start, start + size))
        start += size
    return places
