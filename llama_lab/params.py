"""The shape of a Llama and how many parameters it and its adapter have, in closed form: no weights, no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.choices import ModelSource
from llama_lab.config import LLAMA_LINEAR, LoraSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a LlamaConfig decides about sizes; the counts are of one model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    """lm_head is embed_tokens' own weight."""

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linear layers of one decoder block, by name."""
        h, m, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        sizes = ((h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h))
        return dict(zip(LLAMA_LINEAR, sizes, strict=True))

    def num_linear_params(self) -> int:
        """Weights of the blocks' linear layers: those that are quantised."""
        return self.num_layers * sum(d_in * d_out for d_in, d_out in self.linears().values())

    def num_other_params(self) -> int:
        """Embedding, lm_head and norms: those that are never quantised."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + (2 * self.num_layers + 1) * self.hidden_size


def _llama(h: int, m: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False) -> ModelShape:
    return ModelShape(
        hidden_size=h,
        intermediate_size=m,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=h // heads,
        vocab_size=vocab,
        tied_embeddings=tied,
    )


SHAPES = {
    "tiny": _llama(64, 128, 2, 4, 2, 320),
    "smollm2_135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "llama2_7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama2_13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2_70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "codellama_7b": _llama(4096, 11008, 32, 32, 32, 32016),
    "codellama_7b_python": _llama(4096, 11008, 32, 32, 32, 32000),
}
"""Source: the config.json of each model on the hub."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What the config.json of a model that is built as Llama is has."""

_NAMES = (
    (r"llama-?2-(7|13|70)b", "llama2_{}b"),
    (r"codellama-(7)b-python", "codellama_{}b_python"),
    (r"codellama-(7)b", "codellama_{}b"),
    (r"smollm2[-_](135)m", "smollm2_{}m"),
    (r"^(tiny)$", "{}"),
)


def shape_of(model: ModelSettings) -> ModelShape | None:
    """The shape of a run's base model where it is known without the hub: by name, or from a folder's config.json.

    None where neither says it.
    """
    file = Path(os.path.expanduser(model.name)) / "config.json"
    if model.source is ModelSource.hub and file.is_file():
        try:
            return shape_from_config(json.loads(file.read_text(encoding="utf-8")))
        except KeyError:
            return None
    for pattern, name in _NAMES:
        if found := re.search(pattern, model.name.lower()):
            return SHAPES[name.format(found.group(1))]
    return None


def shape_from_config(config: Any) -> ModelShape:
    """The shape that a LlamaConfig of transformers, or its config.json as a dict, describes."""
    plain: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    heads = plain["num_attention_heads"]
    return ModelShape(
        hidden_size=plain["hidden_size"],
        intermediate_size=plain["intermediate_size"],
        num_layers=plain["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=plain.get("num_key_value_heads") or heads,
        head_dim=plain.get("head_dim") or plain["hidden_size"] // heads,
        vocab_size=plain["vocab_size"],
        tied_embeddings=bool(plain.get("tie_word_embeddings")),
    )


@dataclass(frozen=True, kw_only=True)
class AdaptedLinear:
    """One linear layer that gets an adapter."""

    layer: int
    """Decoder block, counted from 0."""
    name: str
    """q_proj and so on."""
    d_in: int
    d_out: int


def adapted_linears(shape: ModelShape, lora: LoraSettings) -> Iterator[AdaptedLinear]:
    """Every linear layer that PEFT gives an adapter: a target is the end of the layer's full name."""
    for layer in range(shape.num_layers):
        if lora.layers_to_transform and layer not in lora.layers_to_transform:
            continue
        for name, (d_in, d_out) in shape.linears().items():
            if lora.target_modules == "all-linear" or _is_target(_full_name(layer, name), lora.target_modules):
                yield AdaptedLinear(layer=layer, name=name, d_in=d_in, d_out=d_out)


def adapter_tensors(shape: ModelShape, lora: LoraSettings) -> list[int]:
    """Elements of every trainable tensor: A and B, DoRA's magnitudes, and the modules that are trained in full."""
    found: list[int] = []
    for linear in adapted_linears(shape, lora):
        found += [lora.r * linear.d_in, lora.r * linear.d_out]
        if lora.use_dora:
            found.append(linear.d_out)
    return found + _saved_modules(shape, lora)


def count_params(shape: ModelShape, lora: LoraSettings) -> tuple[int, int]:
    """(trainable, all) parameters as PEFT counts them; 4-bit weights count as the numbers they stand for."""
    trainable = sum(adapter_tensors(shape, lora))
    return trainable, shape.num_linear_params() + shape.num_other_params() + trainable


def _saved_modules(shape: ModelShape, lora: LoraSettings) -> list[int]:
    # PEFT keeps the original beside the trained copy, and takes every module whose name ends in one of these words
    sizes = {"model.embed_tokens": shape.vocab_size * shape.hidden_size, "model.norm": shape.hidden_size}
    sizes["lm_head"] = sizes["model.embed_tokens"]
    for layer in range(shape.num_layers):
        for name, (d_in, d_out) in shape.linears().items():
            sizes[_full_name(layer, name)] = d_in * d_out
        for name in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{layer}.{name}"] = shape.hidden_size
    return [size for name, size in sizes.items() if name.endswith(tuple(lora.modules_to_save))]


def _full_name(layer: int, name: str) -> str:
    part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{part}.{name}"


def _is_target(full_name: str, targets: list[str]) -> bool:
    return any(full_name.endswith(f".{target}") for target in targets)
