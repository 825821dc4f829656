"""Whether a folder still holds the base that a run was trained on. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings
from llama_lab.data.files import expanded

SAMPLE = 4096
"""Bytes that are read at the beginning, in the middle and at the end of each tensor."""
SCHEME = "tensors-"
"""How a fingerprint begins, by what it is made of: one that was made in another way says nothing of this one."""
INDEX = "model.safetensors.index.json"
COMPUTED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Settings of a config.json that change what is computed with the same tensors, and the defaults of transformers. What
else stands there, and how, differs from one version of transformers to the next that saves the model again."""


def fingerprint(model: ModelSettings) -> str | None:
    """What tells the base in a folder from every other one, by its content alone: a copy elsewhere has the same.

    It is made of what config.json says is computed, and of the name, the type, the shape and a sample of each tensor,
    in however many files they lie: some megabytes of the 13 GB of a Llama-2-7B, whose whole hash a run would wait for.
    Training changes the tensors that it changes nearly everywhere, so that a sample tells; a few numbers written
    somewhere into a matrix are not seen.

    Returns:
        None for a model of the hub, which its commit names, for an embedded one, and where a file cannot be read, which
        loading tells.
    """
    folder = expanded(model.name)
    if model.source is not ModelSource.hub or not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        tensors = {name: told for file in _weight_files(folder) for name, told in _tensors(file)}
        digest.update(json.dumps(_computed(config), sort_keys=True).encode())
        for name in sorted(tensors):
            if not (name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and _is_tied(config))):
                digest.update(name.encode() + tensors[name])  # the others are made again from what is hashed
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return SCHEME + digest.hexdigest()[:16]


def was_exchanged(lock: dict[str, Any], model: ModelSettings) -> str | None:
    """What differs between the base of a run.json and the one that lies there now; None where nothing is known to.

    Runs that began before fingerprints were kept have none, and go on as they did.
    """
    before = recorded(lock)
    if before is None or (now := fingerprint(model)) in (None, before):
        return None
    return f"the fingerprint of {model.name} was {before} and is {now} now"


def recorded(lock: dict[str, Any]) -> str | None:
    """The fingerprint in a run.json; None where there is none that can be compared with one of now."""
    model = lock.get("model")
    found = model.get("fingerprint") if isinstance(model, dict) else None
    return found if isinstance(found, str) and found.startswith(SCHEME) else None


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says is computed, alike from every version of transformers that writes it."""
    told = {key: default if config.get(key) is None else config[key] for key, default in COMPUTED.items()}
    heads = told["num_attention_heads"]
    told["num_key_value_heads"] = told["num_key_value_heads"] or heads
    told["head_dim"] = told["head_dim"] or (config["hidden_size"] // heads if heads else None)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000
    rest = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return told | {"rope": [kind, float(theta), rest if kind != "default" else {}]}


def _is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings"))


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads; others may lie beside them, such as an adapter's."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        return [folder / name for name in sorted(set(named))]
    return sorted(folder.glob("*.safetensors"))


def _tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    """The name of each tensor in a safetensors file, and a hash of its type, its shape and a sample of it."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(min(length, file.stat().st_size)))
        found = [(entry["data_offsets"], key, entry) for key, entry in header.items() if key != "__metadata__"]
        for (start, end), key, entry in sorted(found, key=lambda one: one[0]):
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            for place in sorted({start, max(start, (start + end - SAMPLE) // 2), max(start, end - SAMPLE)}):
                content.seek(8 + length + place)
                digest.update(content.read(min(SAMPLE, end - place)))
            yield key, digest.digest()
