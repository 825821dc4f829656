"""The files of one run, read without trusting any of them."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_lab.lock import flat
from llama_lab.results import OBJECTIVES, number
from llama_lab.rundir import without_waiting

ENDED = ("ok", "failed", "pruned", "infeasible")
"""What result.json says of a run; the others are running, interrupted and broken."""
NUMBERS = (
    *OBJECTIVES,
    "objective",
    "eval_loss_before",
    "num_trainable_params",
    "num_params",
    "num_steps",
)
"""The numbers of result.json that a table knows."""
TAIL_BYTES = 65536
GROUP_KEYS = {
    "quant": "quant.type",
    "model": "model.name",
    "dataset": "dataset.name",
    "trainer": "trainer.name",
    "tracking": "tracking.backend",
}
"""The setting that speaks for a group where Hydra's own record of the choice is gone."""


@dataclass(kw_only=True)
class Run:
    """One run as its files tell it."""

    folder: Path
    name: str
    status: str
    """ok, failed, pruned, infeasible, running, interrupted (no result, and no process at work) or broken."""
    note: str = ""
    """Why it is not ok."""
    lock: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """By their dotted names."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The finite ones of `NUMBERS`."""

    @property
    def objective_name(self) -> str:
        """The number by which the run is ranked where nothing else is said."""
        return str(self.settings.get("objective", "eval_loss"))

    @property
    def title(self) -> str:
        """The name that W&B shows: the user's, or the words the run was started with."""
        words = self.lock.get("overrides")
        own = self.settings.get("tracking.name")
        return str(own) if own else " ".join(map(str, words)) if isinstance(words, list) else ""

    @cached_property
    def choices(self) -> dict[str, str]:
        """The choice of each config group: what Hydra recorded, else the words, else the setting that speaks for it."""
        spoken = {group: str(self.settings[key]) for group, key in GROUP_KEYS.items() if self.settings.get(key)}
        words = self.lock.get("overrides")
        pairs = (str(word).partition("=") for word in words) if isinstance(words, list) else ()
        typed = {key: value for key, _, value in pairs if "." not in key}
        try:
            text = _bytes(self.folder / ".hydra" / "hydra.yaml").decode()
        except (OSError, UnicodeDecodeError):
            return spoken | typed
        # a YAML parser takes 20 ms a file; Hydra writes this block in one way
        block = re.search(r"^    choices:\n((?:      .*\n)+)", text, flags=re.MULTILINE)
        lines = block[1].splitlines() if block else []
        recorded = dict(line.strip().split(": ", 1) for line in lines if ": " in line and "hydra/" not in line)
        return spoken | typed | recorded

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        rows = []
        for line in _text(self.folder / "metrics.jsonl").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and number(row.get("step")) is not None:
                rows.append(row)
        return rows

    def samples(self) -> str:
        """samples.md; empty where there is none."""
        return _text(self.folder / "samples.md")


def read_run(folder: Path, name: str) -> Run:
    """The run in `folder`; never raises for what its files hold."""
    lock, lock_problem = _json(folder / "run.json")
    result, result_problem = _json(folder / "result.json")
    config = lock.get("config") if lock else None
    settings = flat(config) if isinstance(config, dict) else {}
    run = Run(folder=folder, name=name, status="", lock=lock or {}, settings=settings)
    run.numbers = {key: value for key in NUMBERS if (value := number((result or {}).get(key))) is not None}
    if lock is not None and not settings and not lock_problem:
        lock_problem = "run.json holds no settings"
    run.status, run.note = _status(folder, lock, result, lock_problem or result_problem)
    if run.status == "ok" and number((result or {}).get("objective")) is None:
        run.note = f"its objective, {run.objective_name}, is no finite number"
    return run


def _status(folder: Path, lock: dict[str, Any] | None, result: dict[str, Any] | None, problem: str) -> tuple[str, str]:
    told = str((result or {}).get("status"))
    if told != "ok" and _is_held(folder):
        return "running", ""
    problem = problem or _metrics_problem(folder / "metrics.jsonl")
    if not problem and result is not None:
        if lock is None:
            problem = "there is no run.json beside its result"
        elif told not in ENDED:
            problem = f"result.json says status {told}"
        else:
            return told, "" if told == "ok" else one_line(str(result.get("error") or ""))
    if problem:
        return "broken", problem
    if lock is None:
        return "failed", "it ended before run.json was written"
    return "interrupted", "it has no result and no process works on it"


def _is_held(folder: Path) -> bool:
    """Whether a process works in the folder: `RunDir.held` keeps its .lock."""
    try:
        with open(folder / ".lock", opener=without_waiting) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, when the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _metrics_problem(path: Path) -> str:
    """What is wrong with the end of metrics.jsonl; a kill cuts there."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"metrics.jsonl cannot be read: {error.strerror or error}"
    if not tail:
        return ""
    try:
        is_whole = tail.endswith(b"\n") and isinstance(json.loads(tail.rstrip().rsplit(b"\n", 1)[-1]), dict)
    except (ValueError, RecursionError):
        is_whole = False
    return "" if is_whole else "the last line of metrics.jsonl is not whole"


def _json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The object in the file, None where there is none; and what is wrong with it."""
    try:
        content = json.loads(_bytes(path))
    except FileNotFoundError:
        return None, ""
    except (ValueError, RecursionError):
        return {}, f"{path.name} is not whole"
    except OSError as error:
        return {}, f"{path.name} cannot be read: {error.strerror or error}"
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} is no JSON object")


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode(errors="replace")
    except OSError:
        return ""


def _bytes(path: Path) -> bytes:
    with open(path, "rb", opener=without_waiting) as file:
        return file.read()


def one_line(text: str) -> str:
    """The text on one line, without what could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
