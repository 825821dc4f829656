"""Merged weights, group by group of layers: made, compared with the adapter on its base, and written."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_lab.choices import ComputeDtype, QuantType
from llama_lab.config import QuantSettings
from llama_lab.model import load_base
from llama_lab.quant import DTYPES, compute_dtype
from llama_lab.take.fidelity import Fidelity, Prompts, compare
from llama_lab.take.options import Onto, OutDtype
from llama_lab.take.source import Source
from llama_lab.take.weights import (
    EMBEDDING,
    HEAD,
    LAYER,
    NORM,
    AdapterParts,
    BaseFiles,
    as_settings,
    groups,
    shifted,
    small_adapter,
    small_model,
)

GROUP_BYTES = 2**30
"""fp32 weights of the layers that are worked on at once: one layer of Llama-2 7B is 0.75 GiB."""
WORTH_COLLECTING = 2**26
"""Bytes of a group from which on a search for garbage, which takes a third of a second, is worth it."""
REFERENCE = "adapter"


TORCH_DTYPES = {OutDtype.bf16: torch.bfloat16, OutDtype.fp16: torch.float16, OutDtype.fp32: torch.float32}


@dataclass(kw_only=True)
class Merger:
    """What merging works with."""

    source: Source
    base: BaseFiles
    parts: AdapterParts
    dtype: OutDtype
    prompts: Prompts
    work: Path
    """Where models of a few layers are made; who made it removes what a kill leaves there."""
    tick: Callable[[str], None]
    """Told of each group of layers as it begins."""

    def __post_init__(self) -> None:
        self.computes_in, _ = compute_dtype(self.source.config.quant)
        self.groups = groups(self.base, GROUP_BYTES)

    def measure(self, candidates: list[Onto]) -> dict[Onto, Fidelity]:
        """Compare merges with the adapter on its base, before anything is written."""
        stored = self.tensor(EMBEDDING)
        self.prompts.embed(REFERENCE, stored, self.computes_in)
        for onto in candidates:
            self.prompts.embed(onto, stored.to(TORCH_DTYPES[self.dtype]), self.computes_in)
        del stored
        for layers in self.groups:
            self.tick(f"comparing layers {layers.start + 1} to {layers.stop} of {self.base.num_layers}")
            is_last = layers.stop == self.base.num_layers
            with self._small(layers) as (folder, adapter):
                self.prompts.run(REFERENCE, self._adapted(folder, adapter), is_last=is_last)
                for onto in candidates:
                    model = _with_weights_in(self._rounded(self._merged(folder, adapter, onto)), self.computes_in)
                    self.prompts.run(onto, model, is_last=is_last)
                    del model
        head = self.tensor(HEAD).to(self.computes_in)
        rounded = self.tensor(HEAD).to(TORCH_DTYPES[self.dtype]).to(self.computes_in)
        return {onto: compare(self.prompts, onto, rounded, REFERENCE, head) for onto in candidates}

    def write(self, folder: Path, onto: Onto) -> None:
        """Write merged weights and config.json, one file a group of layers."""
        index: dict[str, str] = {}
        num_files, num_bytes = len(self.groups) + 1, 0
        for number, (what, tensors) in enumerate(self._shards(onto), start=1):
            self.tick(f"writing {what}")
            name = f"model-{number:05d}-of-{num_files:05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": num_bytes}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))

    def check(self, folder: Path) -> Fidelity:
        """Compare what has been written, read from its files, with the adapter on its base as `measure` found it."""
        written = BaseFiles(folder)
        self.prompts.embed("written", written.tensor(EMBEDDING), self.computes_in)
        for layers in self.groups:
            self.tick(f"reading layers {layers.start + 1} to {layers.stop} back")
            with small_model(written, layers, {}, self.work) as small:
                model = self._load(small, QuantSettings(type=QuantType.none, compute_dtype=self._asked()))
                self.prompts.run("written", model, is_last=layers.stop == self.base.num_layers)
                del model
        heads = written.tensor(HEAD).to(self.computes_in), self.tensor(HEAD).to(self.computes_in)
        return compare(self.prompts, "written", heads[0], REFERENCE, heads[1])

    def tensor(self, name: str) -> Tensor:
        """A tensor outside of the layers, with what was trained in full in its place."""
        return self.parts.full[name] if name in self.parts.full else self.base.tensor(name)

    def config(self) -> dict[str, Any]:
        """config.json of the merged model."""
        dtype = str(TORCH_DTYPES[self.dtype]).removeprefix("torch.")
        tied = self.base.is_tied and not {EMBEDDING, HEAD} & self.parts.full.keys()
        config = {key: value for key, value in self.base.config.items() if key not in ("torch_dtype", "_name_or_path")}
        return config | {"dtype": dtype, "tie_word_embeddings": tied, "use_cache": True}

    def _shards(self, onto: Onto) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for layers in self.groups:
            with self._small(layers) as (folder, adapter):
                model = self._rounded(self._merged(folder, adapter, onto))
                tensors = {
                    shifted(name, layers.start): tensor
                    for name, tensor in model.state_dict().items()
                    if LAYER.match(name)
                }
                yield f"layers {layers.start + 1} to {layers.stop} of {self.base.num_layers}", tensors
                del model, tensors
        names = [EMBEDDING, NORM] + [HEAD] * (not self.config()["tie_word_embeddings"])
        yield "embedding and head", {name: self.tensor(name).to(TORCH_DTYPES[self.dtype]).clone() for name in names}

    @contextmanager
    def _small(self, layers: range) -> Iterator[tuple[Path, Path | None]]:
        with (
            small_model(self.base, layers, self.parts.full, self.work) as base,
            small_adapter(self.parts, layers, self.work) as adapter,
        ):
            yield base, adapter

    def _adapted(self, folder: Path, adapter: Path | None) -> Any:
        base = self._load(folder, self.source.config.quant)
        return _with_adapter(base, adapter)

    def _merged(self, folder: Path, adapter: Path | None, onto: Onto) -> Any:
        """A model of these layers with plain weights in fp32."""
        plain = QuantSettings(type=QuantType.none, compute_dtype=ComputeDtype.float32)
        base = self._load(folder, plain if onto is Onto.original else self.source.config.quant)
        if onto is Onto.dequantised:
            base = _with_weights_in(base.dequantize(), torch.float32)
        merged = _with_adapter(base, adapter)
        if adapter is not None:
            with _quietly():  # PEFT says that a merge into 4-bit weights may differ
                merged = merged.merge_and_unload()
        return _with_weights_in(merged.dequantize(), torch.float32) if onto is Onto.quantised else merged

    def _load(self, folder: Path, quant: QuantSettings) -> Any:
        if self.base.layer_bytes * len(self.groups[0]) > WORTH_COLLECTING:
            gc.collect()  # the layers before: PEFT's models refer to themselves
        return load_base(as_settings(folder, self.source.config.model), quant, dense=False)

    def _rounded(self, model: Any) -> Any:
        return _with_weights_in(model, TORCH_DTYPES[self.dtype])

    def _asked(self) -> ComputeDtype:
        return next(word for word, dtype in DTYPES.items() if dtype is self.computes_in)


def _with_weights_in(model: Any, dtype: torch.dtype) -> Any:
    for weight in model.parameters():  # the buffers are the frequencies of the rotation, which stay in fp32
        weight.data = weight.data.to(dtype)
    return model


def _with_adapter(base: Any, adapter: Path | None) -> Any:
    from peft import PeftModel

    if adapter is None:
        return base.eval()
    return PeftModel.from_pretrained(base, str(adapter)).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
