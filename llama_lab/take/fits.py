"""Whether an adapter fits a base, from the headers of their files alone: no weight is read, no torch imported."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from llama_lab.checkpoints import WEIGHTS
from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings
from llama_lab.data.files import expanded
from llama_lab.errors import ModelError
from llama_lab.take.peft_config import check_built, check_weights

LAYER = re.compile(r"\.layers\.(\d+)\.")


def check_fits(adapter: Path, peft: dict[str, Any], model: ModelSettings) -> None:
    """Refuse an adapter that is not one, or of another base where the base is a folder whose config.json can be asked.

    Raises:
        ModelError: names the sizes that differ, and the base that the adapter was made for.
    """
    shapes = tensor_shapes(adapter / WEIGHTS)
    check_weights(shapes, peft, adapter)
    folder = expanded(model.name)
    if model.source is not ModelSource.hub or not (folder / "config.json").is_file():
        return
    base = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if peft.get("layer_replication"):  # PEFT makes more layers of those that the base has
        base.pop("num_hidden_layers", None)
    check_shapes(shapes, base, f"{adapter}", model.name, str(peft.get("base_model_name_or_path")))


def check_loaded(model: Any, adapter: Path) -> None:
    """Refuse an adapter of which PEFT has loaded a part, or that it has built larger than its file.

    Args:
        model: PEFT's.
    Raises:
        ModelError: names the first layer that only one of them has.
    """
    names = (name for name, _ in model.named_parameters())
    check_built(names, tensor_shapes(adapter / WEIGHTS), adapter)


def check_shapes(
    shapes: dict[str, tuple[int, ...]], base: dict[str, Any], adapter: str, name: str, trained_on: str
) -> None:
    """Refuse shapes of an adapter that a base with this config.json does not have."""
    rows = {shape[0] for key, shape in shapes.items() if _is_vocabulary(key)}
    vocabulary = base.get("vocab_size")
    if rows and vocabulary and rows != {vocabulary}:
        raise ModelError(
            f"{adapter} was trained with a vocabulary of {max(rows)} tokens, and {name} has {vocabulary}: tokens were "
            f"added before training, such as a <pad> to Llama-2's 32000. Type model.name= with the base whose "
            f"embedding was resized to {max(rows)} rows, or train again without adding tokens: <unk> pads as well."
        )
    widths = {shape[-1] for key, shape in shapes.items() if "q_proj" in key and "lora_A" in key}
    width = base.get("hidden_size")
    if widths and width and widths != {width}:
        raise _other_base(adapter, f"layers of width {max(widths)}", f"{width}", name, trained_on)
    layers = [int(found[1]) for key in shapes if (found := LAYER.search(key))]
    num_layers = base.get("num_hidden_layers")
    if layers and num_layers and max(layers) >= num_layers:
        raise _other_base(adapter, f"at least {max(layers) + 1} layers", f"{num_layers}", name, trained_on)


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file by name.

    Raises:
        ModelError: the file is not whole.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(min(length, size)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        shapes = {key: tuple(map(int, entry["shape"])) for key, entry in header.items() if key != "__metadata__"}
        is_whole = 8 + length + max(ends, default=0) == size
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ModelError(f"{file} is not a whole safetensors file: the adapter was cut off. Copy or save it again.")
    return shapes


def _is_vocabulary(key: str) -> bool:
    return key.endswith((".embed_tokens.weight", ".lm_head.weight"))


def _other_base(adapter: str, has: str, wanted: str, name: str, trained_on: str) -> ModelError:
    return ModelError(
        f"{adapter} is the adapter of another base: it has {has}, and {name} has {wanted}. It was trained on "
        f"{trained_on}. Type model.name= with that one."
    )
