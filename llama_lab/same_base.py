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


def fingerprint(model: ModelSettings) -> str | None:
    """What tells the base in a folder from every other one, by its content alone: a copy elsewhere has the same.

    It is made of config.json, and of each weight file the name, the size, the header and a sample of each tensor: some
    megabytes of the 13 GB of a Llama-2-7B, whose whole hash a run would wait for. Training changes the tensors that it
    changes nearly everywhere, so that a sample tells; a few numbers written somewhere into a matrix are not seen.

    Returns:
        None for a model of the hub, which its commit names, for an embedded one, and where a file cannot be read, which
        loading tells.
    """
    folder = expanded(model.name)
    if model.source is not ModelSource.hub or not os.path.isdir(folder):
        return None
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for part in _samples(file):
                digest.update(part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return digest.hexdigest()[:16]


def was_exchanged(lock: dict[str, Any], model: ModelSettings) -> str | None:
    """What differs between the base of a run.json and the one that lies there now; None where nothing is known to.

    Runs that began before fingerprints were kept have none, and go on as they did.
    """
    before = (lock.get("model") or {}).get("fingerprint")
    if before is None or (now := fingerprint(model)) in (None, before):
        return None
    return f"the fingerprint of {model.name} was {before} and is {now} now"


def _samples(file: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and bytes of each of its tensors."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = content.read(min(length, file.stat().st_size))
        yield header
        places = [entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"]
        for start, end in sorted(places):
            for place in sorted({start, max(start, (start + end - SAMPLE) // 2), max(start, end - SAMPLE)}):
                content.seek(8 + length + place)
                yield content.read(min(SAMPLE, end - place))
