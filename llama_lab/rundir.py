"""The folder of one run: the public contract of its files, and the lock that keeps two processes out of it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llama_lab.choices import Resume
from llama_lab.errors import RunError
from llama_lab.results import SCHEMA, Result

STAGES_FILE = "stages.json"
"""The mark of a folder in which several runs lie that are stages of one command (stages.py)."""
_CLAIMED: dict[Path, TextIO] = {}
"""The locks that this process keeps until it ends, by folder."""


class RunDir:
    """The files of a run, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.lock = folder / "run.json"
        self.metrics = folder / "metrics.jsonl"
        self.result = folder / "result.json"
        self.samples = folder / "samples.md"
        self.adapter = folder / "adapter"
        self.checkpoints = folder / "checkpoints"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out of the folder until this one ends, however it ends.

        Raises:
            RunError: another process works in it.
        """
        if self.path.resolve() in _CLAIMED:
            yield
            return
        with self._locked():
            yield

    def claim(self) -> None:
        """Keep every other process out until this one ends, from before anything else is written there.

        Raises:
            RunError: another process works in it.
        """
        if (folder := self.path.resolve()) not in _CLAIMED:
            _CLAIMED[folder] = self._locked()

    def _locked(self) -> TextIO:
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise RunError(f"{self.path} is in use by process {owner}. Wait for it, or end it.") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file

    def read_lock(self) -> dict[str, Any]:
        """run.json.

        Raises:
            RunError: the folder holds no run, or the file is not whole.
        """
        lock = _read_json(self.lock, f"{self.path} holds no run (there is no run.json in it)", "Start a new run")
        if not (isinstance(lock.get("config"), dict) and isinstance(lock.get("overrides"), list)):
            raise RunError(f"{self.lock} lacks the settings of a run. Start a new run.")
        return lock

    def write_lock(self, lock: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(self.lock, lock)

    def read_result(self) -> dict[str, Any]:
        """result.json.

        Raises:
            RunError: the run has not ended, or the file is not whole.
        """
        return _read_json(self.result, f"{self.path} has no result yet", "Bring it back, or remove it")

    def write_result(
        self, result: Result | None, *, status: str, error: str | None = None, num_steps: int | None = None
    ) -> None:
        """Write result.json; `status` is ok, failed, pruned or infeasible.

        Args:
            num_steps: optimizer steps of a run that was pruned.
        """
        numbers = result.as_json() if result else {} if num_steps is None else {"num_steps": num_steps}
        write_json(self.result, {"schema": SCHEMA, "status": status, **numbers, "error": error})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; one that a kill cut off, or that is none of ours, is left out."""
        # a byte that is no UTF-8 spoils its line alone
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.exists() else ""
        rows = []
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int | float):
                rows.append(row)
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        kept = [json.dumps(row) + "\n" for row in self.read_metrics() if row["step"] <= step]
        write_text(self.metrics, "".join(kept))

    def lacks_adapter(self) -> str:
        """What a run without an adapter is, and how to come to one."""
        if self.result.exists() and self.read_result().get("status") == "ok":
            gone = f"{self.adapter} holds none. Bring it back, as from a checkpoint in {self.checkpoints}."
            return f"has ended, and its adapter is gone: {gone}"
        return f"has no adapter yet. Finish the run with: {how_to_go_on(self.path)}"

    def write_samples(self, text: str) -> None:
        """Write samples.md."""
        write_text(self.samples, text)

    @contextmanager
    def replacing(self, folder: Path) -> Iterator[Path]:
        """A new folder to fill; it takes the place of `folder` when the block ends well."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


@contextmanager
def telling_how_to_go_on(folder: Path, begun: str) -> Iterator[None]:
    """Let Ctrl-C say with which words the run in `folder` goes on.

    Args:
        begun: the file without which nothing is there to go on with.
    """
    try:
        yield
    except KeyboardInterrupt:
        how = f"Go on with: {how_to_go_on(folder)}" if (folder / begun).is_file() else ""
        raise KeyboardInterrupt(how) from None


def how_to_go_on(folder: Path) -> str:
    """The command that does it, as it may be typed in a shell."""
    return f"python -m llama_lab {shlex.quote(f'resume={folder}')}"


def check_run_folder(folder: Path, resume: Resume, key: str = "hydra.run.dir") -> None:
    """Refuse a folder that cannot take this run, before anything is written into it.

    Args:
        key: the setting that names the folder.
    Raises:
        RunError: it cannot be written, or it holds a run and `resume` does not say to go on with it.
    """
    if os.path.exists(folder / "run.json") and resume is Resume.never:
        raise RunError(f"{folder} holds a run already. Type resume={folder} to go on with it, or another {key}.")
    # os.path instead of pathlib: a name that is too long is then absent instead of an OSError
    existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not os.path.isdir(existing):
        raise RunError(f"{key}={folder}: {existing} is a file, not a folder. Type another {key}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{key}={folder}: {existing} cannot be written. Type another {key}.")


def _read_json(path: Path, absent: str, instead: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8", opener=without_waiting) as file:
            content = json.loads(file.read())
    except FileNotFoundError:
        raise RunError(f"{absent}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        content = None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is not whole, so the run cannot be read. {instead}.")
    return content


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open`: what is a pipe, and no file, is empty instead of waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
