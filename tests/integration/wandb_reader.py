"""Reads an offline run's .wandb file back: W&B's own records in LevelDB's log framing (W&B ships no Python reader)."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEADER_BYTES = 7
BLOCK_BYTES = 32768


@dataclass
class OfflineRun:
    """What the file says of one run."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_offline_run(path: Path) -> OfflineRun:
    """The run in `path`, later records over earlier ones."""
    run = OfflineRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name = record.run.run_id, record.run.display_name
            run.group, run.job_type, run.tags = record.run.run_group, record.run.job_type, list(record.run.tags)
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(raw: bytes) -> Iterator[Any]:
    assert raw[:4] == b":W&B"
    at, parts = HEADER_BYTES, b""
    while at + HEADER_BYTES <= len(raw):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER_BYTES:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + HEADER_BYTES])
        chunk = raw[at + HEADER_BYTES : at + HEADER_BYTES + size]
        at += HEADER_BYTES + size
        if kind == 0 or len(chunk) < size:
            return  # the writer was cut off here
        parts = chunk if kind in (1, 2) else parts + chunk  # whole or first; middle or last
        if kind in (1, 4):  # whole or last
            record = pb.Record()
            record.ParseFromString(parts)
            yield record


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
