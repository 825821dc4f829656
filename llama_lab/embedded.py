"""Models that need no hub: converted once from a pip package, or drawn from a seed, into a cache folder."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings
from llama_lab.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY_VERSION = 1
"""Raised when the tiny model changes, so that no old one is taken from the cache."""


def cache_dir() -> Path:
    """Where embedded models are kept: $LLAMA_LAB_CACHE, else llama_lab in the user's cache folder."""
    if own := os.environ.get("LLAMA_LAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "llama_lab"


def materialise(model: ModelSettings) -> Path:
    """The folder of an embedded model as safetensors; made on first use, whole or not at all.

    Raises:
        ModelError: the package lacks the file, or the cache folder cannot be written.
    """
    make = _convert_gguf if model.source is ModelSource.package else _make_tiny
    key = f"tiny-{TINY_VERSION}" if model.source is ModelSource.random else f"{model.name}-{_digest(gguf_file(model))}"
    folder = cache_dir() / key
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder.parent} cannot be written: {error.strerror}. Set LLAMA_LAB_CACHE to another."
        ) from None
    try:
        make(model, partial)
        _put(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def gguf_file(model: ModelSettings) -> Path:
    """The GGUF file inside its pip package.

    Raises:
        ModelError: package or file is missing.
    """
    spec = find_spec(str(model.package))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / str(model.file)).is_file():
            return Path(folder) / str(model.file)
    raise ModelError(f"There is no file {model.file} in the pip package {model.package}.")


def _convert_gguf(model: ModelSettings, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf_file(model)
    with _gguf_read_once(), redirect_stderr(io.StringIO()):  # it draws a bar of its own
        # without dequantize=True transformers 5 keeps GGUF's own quantizer: no training, no saving
        base = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    base.config.name_or_path = model.name
    base.save_pretrained(folder)
    # transformers 5.17 reads another EOS from the GGUF than the file says; the model's own numbers are right in all
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(base.config.bos_token_id)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(base.config.eos_token_id)
    tokenizer.save_pretrained(folder)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers, which reads the file's header three times and builds its table of names for every module, do
    each once: a quarter of the time.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _make_tiny(model: ModelSettings, folder: Path) -> None:
    """2 layers of width 64 with grouped-query attention: every code path of Llama-2 70B in 0.2 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """<unk> 0, <s> 1, </s> 2 as in Llama-2, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )


def _put(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first, with the same content
            raise


def _digest(file: Path) -> str:
    now = file.stat()
    return _digest_of(file, now.st_size, now.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, size: int, changed_ns: int) -> str:
    """Read once a process: a run asks several times where its base lies, and a stack has many runs."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]
