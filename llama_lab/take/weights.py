"""The safetensors of a model, read tensor by tensor; and folders that hold a few of its layers as a model of its own.

A model of a few layers is loaded, quantised, given its part of the adapter and merged by transformers, bitsandbytes and
PEFT as the whole one would be, and takes the memory of these layers alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings
from llama_lab.errors import ModelError
from llama_lab.hub import loading
from llama_lab.model import base_path

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OUTSIDE = (EMBEDDING, NORM, HEAD)
"""What a Llama has beside its layers."""
SMALL_VOCABULARY = 8
"""Of a model of a few layers, whose embedding is not used."""


class BaseFiles:
    """The weights of a folder, none of them kept in memory.

    Raises:
        ModelError: the folder has no safetensors, or is no model of `model.layers.N`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.num_layers = int(self.config["num_hidden_layers"])
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as content:
                    self.files |= dict.fromkeys(content.keys(), file)
            except SafetensorError as error:
                raise ModelError(f"{file} is damaged: {error}. Bring the base back as it was.") from error
        if EMBEDDING not in self.files or not any(LAYER.match(name) for name in self.files):
            raise ModelError(f"{folder} holds no model whose layers are named model.layers.N, as a Llama's are.")
        if "quantization_config" in self.config:
            raise ModelError(
                f"The weights in {folder} are stored quantised. Type model.name= with the model they were made from."
            )

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD not in self.files

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        name = EMBEDDING if name == HEAD and self.is_tied else name
        with safe_open(self.files[name], framework="pt") as content:
            return content.get_tensor(name)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer by their names within the model."""
        prefix = f"model.layers.{index}."
        return {name: self.tensor(name) for name in self.files if name.startswith(prefix)}

    @cached_property
    def layer_bytes(self) -> int:
        """Of the first layer's numbers in fp32."""
        return sum(4 * tensor.numel() for tensor in self.layer(0).values())


def base_files(model: ModelSettings) -> BaseFiles:
    """The files of a base by folder, hub id or embedded name; a hub id is downloaded where it is not there yet.

    Raises:
        ModelError: it cannot be found.
    """
    path = Path(base_path(model)).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        with loading(model.name, "model.name", model.revision):
            wanted = ["*.safetensors", "*.json", "tokenizer.model"]
            path = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=wanted))
    return BaseFiles(path)


@dataclass(kw_only=True)
class AdapterParts:
    """The tensors of an adapter: its LoRA by layer, and modules that were trained in full by name."""

    peft: dict[str, Any]
    lora: dict[str, Tensor]
    """By PEFT's names, base_model.model.model.layers.N... ."""
    full: dict[str, Tensor]
    """By the model's names, such as lm_head.weight: they take the place of the base's."""


def adapter_parts(folder: Path, peft: dict[str, Any]) -> AdapterParts:
    """Read an adapter.

    Raises:
        ModelError: it is none that can be merged layer by layer.
    """
    if peft["peft_type"] != "LORA" or peft.get("layer_replication"):
        kind = "one that repeats layers" if peft.get("layer_replication") else peft["peft_type"]
        raise ModelError(f"{folder}: a LoRA can be merged, and this adapter is {kind}.")
    parts = AdapterParts(peft=peft, lora={}, full={})
    of_parameters = {f".{name.rpartition('.')[0]}" for name in peft.get("target_parameters") or []}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        module = name.partition(".lora_")[0]
        if module != name and any(f".{module}".endswith(one) for one in of_parameters):
            raise ModelError(
                f"{folder}: the LoRA of {module} is on its parameter (target_parameters), which cannot be merged layer "
                "by layer. PEFT's merge_and_unload merges it on the whole model."
            )
        if ".lora_" in name and LAYER.match(name):
            parts.lora[key] = tensor
        elif ".lora_" not in name and (name in OUTSIDE or LAYER.match(name)):
            parts.full[name] = tensor
        else:
            raise ModelError(f"{folder}: {name} cannot be merged. LoRA on the decoder layers can, and whole modules.")
    return parts


def groups(base: BaseFiles, budget_bytes: int) -> list[range]:
    """Layers that are worked on together: as many as fit into `budget_bytes` in fp32, at least one."""
    size = max(1, budget_bytes // base.layer_bytes)
    return [range(i, min(i + size, base.num_layers)) for i in range(0, base.num_layers, size)]


@contextmanager
def small_model(base: BaseFiles, layers: range, full: dict[str, Tensor], within: Path) -> Iterator[Path]:
    """A folder with these layers, and the norm behind the last one, as a model of its own.

    Args:
        full: tensors that take the place of the base's.
        within: where the folder is made.
    """
    with TemporaryDirectory(prefix="layers-", dir=within) as name:
        folder = Path(name)
        tensors = {
            LAYER.sub(f"model.layers.{i}.", key): full.get(key, tensor).contiguous()
            for i, layer in enumerate(layers)
            for key, tensor in base.layer(layer).items()
            if not key.endswith("rotary_emb.inv_freq")  # of old files; transformers computes it
        }
        dtype = next(iter(tensors.values())).dtype
        tensors[NORM] = full.get(NORM, base.tensor(NORM))
        tensors[EMBEDDING] = torch.zeros(SMALL_VOCABULARY, tensors[NORM].numel(), dtype=dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_small_config(base.config, layers)))
        yield folder


@contextmanager
def small_adapter(parts: AdapterParts, layers: range, within: Path) -> Iterator[Path | None]:
    """The part of an adapter that belongs to these layers, for their model; None where they have none.

    Args:
        within: where its folder is made.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, tensor in parts.lora.items():
        name = key.removeprefix("base_model.model.")
        layer = int(LAYER.match(name)[1])  # type: ignore[index]
        if layer in layers:
            new = LAYER.sub(f"model.layers.{layer - layers.start}.", name)
            tensors[f"base_model.model.{new}"] = tensor
            names[name.partition(".lora_")[0]] = new.partition(".lora_")[0]
    if not tensors:
        yield None
        return
    with TemporaryDirectory(prefix="adapter-", dir=within) as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "adapter_config.json").write_text(json.dumps(_small_peft(parts.peft, names)))
        yield Path(folder)


def _small_config(config: dict[str, Any], layers: range) -> dict[str, Any]:
    num_layers = config["num_hidden_layers"]
    small = {
        # what is told layer by layer, such as layer_types, is told of these
        key: value[layers.start : layers.stop] if isinstance(value, list) and len(value) == num_layers else value
        for key, value in config.items()
    }
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return small | {"num_hidden_layers": len(layers), "vocab_size": SMALL_VOCABULARY, "tie_word_embeddings": True}


def _small_peft(peft: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """adapter_config.json for renumbered layers; ranks and alphas that differ by layer are told by full names."""
    from peft.utils.other import get_pattern_key

    def by_full_name(pattern: dict[str, Any] | None) -> dict[str, Any]:
        known = pattern or {}
        found = {new: known.get(get_pattern_key(list(known), old)) for old, new in names.items()}
        return {re.escape(new): value for new, value in found.items() if value is not None}

    return peft | {
        "target_modules": sorted(names.values()),
        "rank_pattern": by_full_name(peft.get("rank_pattern")),
        "alpha_pattern": by_full_name(peft.get("alpha_pattern")),
        "base_model_name_or_path": None,
        **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules")),
    }


def shifted(name: str, by: int) -> str:
    """The name of a tensor as it is in a model whose layers are counted from another number."""
    return LAYER.sub(lambda found: f"model.layers.{int(found[1]) + by}.", name)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def as_settings(folder: Path, model: ModelSettings) -> ModelSettings:
    """Model settings that load this folder, and compute attention as the run did."""
    return ModelSettings(name=str(folder), source=ModelSource.hub, attn_implementation=model.attn_implementation)
