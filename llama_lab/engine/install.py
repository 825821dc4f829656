"""Puts the operations of this package into a loaded model; every module that they do not cover stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, eager_attention_forward

from llama_lab.engine.attention import Attend
from llama_lab.engine.frozen import base_of, dense_weight, stacked
from llama_lab.engine.layers import RmsNorm, Rotate, SwiGlu
from llama_lab.engine.projection import Part, Project

TAKES_ROWS: WeakSet[nn.Module] = WeakSet()
"""Models all of whose attention is told by `rows=` where a row begins and ends."""


def speed_up(model: nn.Module) -> int:
    """Let the Llama blocks of a PEFT model compute with fewer operations from now on.

    A projection is left to PEFT where it is more than linear layers with one plain LoRA each (DoRA, a LoRA with biases,
    biases that are trained, an int8 base, several adapters), and for as long as the adapter is switched off or merged.

    Its loss then takes rows one behind the other (loss.summed_loss).

    Returns:
        How many projections are computed so; 0 where the model is not of transformers' Llama classes.
    """
    found, attentions, fused = 0, 0, 0
    for module in list(model.modules()):
        if type(module) is LlamaRMSNorm and not module.weight.requires_grad:
            _compute_by(module, partial(_norm, module))
        elif type(module) is LlamaAttention:
            qkv, out = joined([module.q_proj, module.k_proj, module.v_proj]), joined([module.o_proj])
            found += (qkv is not None) + (out is not None)
            attentions += 1
            if qkv is not None:
                fused += 1
                _compute_by(module, partial(_attention, module, module.forward, qkv, out or Plain(module.o_proj)))
        elif type(module) is LlamaMLP:
            gate_up, down = joined([module.gate_proj, module.up_proj]), joined([module.down_proj])
            found += (gate_up is not None) + (down is not None)
            if gate_up is not None and isinstance(module.act_fn, nn.SiLU | _silu_of_transformers()):
                _compute_by(module, partial(_mlp, module.forward, gate_up, down or Plain(module.down_proj)))
    if attentions and fused == attentions:
        TAKES_ROWS.add(model)
    return found


class Plain:
    """A projection that stays what it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def is_live(self) -> bool:
        """Always."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.module(x)


class Joined:
    """Linear layers that share their input, with the LoRA on each."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        bases = [base_of(layer) for layer in layers]
        self.weight = stacked(bases)
        biases = [base.bias.data for base in bases if base.bias is not None]
        self.bias = torch.cat(biases).to(self.weight.dtype) if biases else None
        self.adapted = [layer for layer in layers if layer is not base_of(layer)]

    def is_live(self) -> bool:
        """Whether every LoRA is on, alone and apart from its base."""
        return all(
            not layer.disable_adapters and not layer.merged and layer.active_adapters == list(layer.lora_A)
            for layer in self.adapted
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., sum of out)."""
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        a = [next(iter(layer.lora_A.values())).weight for layer in self.adapted]
        b = [next(iter(layer.lora_B.values())).weight for layer in self.adapted]
        if a:
            y = Project.apply(rows, self.weight, self.bias, [_part(layer) for layer in self.layers], *a, *b)
        else:
            y = nn.functional.linear(rows, self.weight, self.bias)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def joined(layers: Sequence[Any]) -> Joined | None:
    """The layers as one projection; None where they are more than linear layers with a plain LoRA or none."""
    bases = [base_of(layer) for layer in layers]
    if len({base.bias is None for base in bases}) > 1 or any(dense_weight(base) is None for base in bases):
        return None
    if any(base.bias is not None and base.bias.requires_grad for base in bases):  # lora.bias: `Joined` has a copy
        return None
    adapted = [layer for layer, base in zip(layers, bases, strict=True) if layer is not base]
    return Joined(layers) if all(map(_is_plain, adapted)) else None


def _compute_by(module: Any, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _norm(module: Any, x: Tensor) -> Tensor:
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _mlp(of_transformers: Callable[..., Tensor], gate_up: Joined, down: Joined | Plain, x: Tensor) -> Tensor:
    if not (gate_up.is_live() and down.is_live()):
        return of_transformers(x)
    return down(SwiGlu.apply(gate_up(x)))


def _attention(
    module: Any,
    of_transformers: Callable[..., Any],
    qkv: Joined,
    out: Joined | Plain,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if not (qkv.is_live() and out.is_live()):
        return of_transformers(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    num_rows, length, _ = hidden_states.shape
    num_kv = module.config.num_key_value_heads
    heads = qkv(hidden_states).view(num_rows, length, -1, module.head_dim)
    rows = kwargs.pop("rows", None)
    dropout = module.attention_dropout if module.training else 0.0
    if rows is not None and past_key_values is None and not dropout:
        cos, sin = (angles[0, :, None] for angles in position_embeddings)
        turned, value = Rotate.apply(heads[0, :, :-num_kv], cos, sin), heads[0, :, -num_kv:]
        found = Attend.apply(turned[:, :-num_kv], turned[:, -num_kv:], value, rows, module.scaling)
        return out(found.view(1, length, -1)), None
    cos, sin = (angles[:, :, None] for angles in position_embeddings)
    turned = Rotate.apply(heads[:, :, :-num_kv], cos, sin)
    query, key, value = (
        x.transpose(1, 2) for x in (turned[:, :, :-num_kv], turned[:, :, -num_kv:], heads[:, :, -num_kv:])
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    found, weights = attend(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
    )
    return out(found.reshape(num_rows, length, -1)), weights


def _part(layer: Any) -> Part:
    base = base_of(layer)
    if layer is base:
        return Part(size=base.out_features)
    name = next(iter(layer.lora_A))
    drop = layer.lora_dropout[name]
    return Part(
        size=base.out_features,
        rank=layer.r[name],
        scale=layer.scaling[name],
        dropout=drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0,
    )


def _is_plain(layer: Any) -> bool:
    return (
        len(layer.lora_A) == 1
        and not layer.lora_variant
        and all(matrix.bias is None for part in (layer.lora_A, layer.lora_B) for matrix in part.values())
    )


def _silu_of_transformers() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])
