"""Data that was read and tokenised once, kept on disk: whole or not at all, and never taken for other data.

Beside the embedded models, in the cache folder's `datasets`. Any folder there may be deleted; it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_lab import __version__
from llama_lab.dataset_config import DatasetSettings
from llama_lab.embedded import cache_dir
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META = "meta.json"
LOST_AFTER_S = 7 * 24 * 3600
"""A partial folder of this age is what a killed process left."""

LATER = (
    "sample.py",
    "sample_preference.py",
    "sample_rewards.py",
    "batches.py",
    "audit.py",
    "pairs.py",
    "findings.py",
    "view.py",
)
"""Modules of this folder that make no tokens of rows. A module that is new counts until it is named here."""

PLACE = ("name", "path", "package", "file", "revision", "subset", "split", "eval_split")
"""Settings that say where rows are; the digest of what lies there stands for them."""


LATER_SETTINGS = (
    *("packing", "pad_to_multiple_of", "metrics"),
    *("max_cut_share", "max_empty_share", "max_duplicate_share", "max_leak_share"),
)
"""Settings that are read when there are tokens already."""


def cached(kind: str, key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder of some data, and what is known about it; it gets its name when all of it is written.

    Of two processes that make the same at once the first wins, and both use its folder.

    Args:
        make: writes the files into the folder and returns what is to be known about them.
    Raises:
        DataError: the cache folder cannot be written; or what `make` raises.
    """
    folder = cache_dir() / "datasets" / f"{kind}-{key}"
    if (known := _known_of(folder)) is not None:
        return folder, known
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            known = make(partial)
            sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
            (partial / META).write_text(json.dumps({"files": sizes, "known": known}), encoding="utf-8")
            _put(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The cache folder {folder.parent} cannot be written: {error.strerror or error}. Set LLAMA_LAB_CACHE to "
            "another."
        ) from None
    return folder, cast(dict[str, Any], _known_of(folder))


def _known_of(folder: Path) -> dict[str, Any] | None:
    """What is known about a folder's data; None where the folder is not whole."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        is_whole = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
        return cast(dict[str, Any], meta["known"]) if is_whole else None
    except (OSError, ValueError, KeyError):
        return None


def _put(partial: Path, folder: Path) -> None:
    for file in partial.iterdir():  # a name must not outlive a power cut that its content did not
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if folder.is_dir() and _known_of(folder) is None:
        shutil.rmtree(folder)  # somebody deleted some of its files
    try:
        partial.rename(folder)
    except OSError:
        if _known_of(folder) is None:  # else another process was first
            raise


def _sweep(parent: Path) -> None:
    for partial in parent.glob(".*"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > LOST_AFTER_S:
                shutil.rmtree(partial)


def digest(*parts: Any) -> str:
    """A short name for what JSON-able parts say together."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def settings_without(dataset: DatasetSettings, *names: str) -> dict[str, Any]:
    """All settings but some. A setting that is new counts until somebody says that it changes nothing."""
    return {name: value for name, value in asdict(dataset).items() if name not in (*PLACE, *names)}


@cache
def code_digest() -> str:
    """Of the code that makes tokens of rows: a change of it makes all that is cached old."""
    files = sorted(path for path in Path(__file__).parent.rglob("*.py") if path.name not in LATER)
    return digest(__version__, [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def file_digest(file: Path) -> str:
    """Of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a chat becomes: vocabulary, rules, special tokens, template, library versions."""
    import tokenizers
    import transformers

    fast = getattr(tokenizer, "backend_tokenizer", None)
    # what comes before the added tokens is how the last batch was padded and truncated
    rules = fast.to_str().partition('"added_tokens"')[2] if fast is not None else sorted(tokenizer.get_vocab().items())
    return digest(
        type(tokenizer).__name__,
        hashlib.sha256(json.dumps(rules).encode()).hexdigest(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        transformers.__version__,
        tokenizers.__version__,
    )
