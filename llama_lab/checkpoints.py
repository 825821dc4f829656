"""The checkpoints of a run by their names: which is the newest, who wrote it, and whether it can be read."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from llama_lab.errors import ConfigError, RunError

PARTIAL = ".partial"
"""The folder in which a checkpoint is written before it gets its name."""
FLAT_STATE = "moments.npy"
"""The file by which a checkpoint of engine/loop.py is known: AdamW's two moments of the flat adapter."""
WEIGHTS = "adapter_model.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(folder: Path) -> list[Path]:
    """All complete ones, the oldest first; they get their names only when complete. Other names are not ours."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest of them."""
    found = checkpoints_in(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint by its name; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def check_written_by(checkpoint: Path | None, *, flat: bool) -> None:
    """Refuse to go on from a checkpoint of the other way to train: its optimizer's states would be lost.

    Raises:
        ConfigError: names the engine that wrote it.
    """
    if checkpoint is not None and (checkpoint / FLAT_STATE).exists() is not flat:
        other = "standard" if flat else "fast"
        raise ConfigError(
            f"{checkpoint} was written by the other engine, whose optimizer keeps its states in another form. "
            f"Type trainer.engine={other}, on the kind of device it began on."
        )


def check_readable(folder: Path) -> None:
    """Refuse to go on from a newest checkpoint that something has damaged since it was written.

    Raises:
        RunError: names the file, and what the run goes on from without that checkpoint.
    """
    *older, newest = [None, *checkpoints_in(folder)]
    if newest is None:
        return
    files = sorted({newest / WEIGHTS, *newest.iterdir()})
    for file in files:
        if (reason := damage(file)) is not None:
            then = f"goes on from {older[-1]}" if older[-1] else "starts again"
            raise RunError(f"{file} cannot be read: {reason}. Remove the folder {newest}, and the run {then}.")


def damage(file: Path) -> str | None:
    """Why a file cannot be read; None where it can, as far as that is quickly known."""
    read = READERS.get(file.suffix)
    try:
        return read(file) if read else None
    except Exception as error:  # each library has its own
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _json(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


def _tensors(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "np"):  # compares the sizes in its head with that of the file
        pass


def _array(file: Path) -> None:
    import numpy as np

    np.load(file, mmap_mode="r")


def _archive(file: Path) -> str | None:
    """What torch.save writes is a zip, whose list of contents is at its end."""
    return None if zipfile.is_zipfile(file) else "it is not whole"


READERS: dict[str, Callable[[Path], str | None]] = {
    ".json": _json,
    ".safetensors": _tensors,
    ".npy": _array,
    ".pt": _archive,
    ".pth": _archive,
    ".bin": _archive,
}
"""By the ends of their names."""


def flush(folder: Path) -> None:
    """Wait until the disk has the files: a name must never outlive a power cut that its content did not."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
