"""The runs below any folders, found and read in one pass; what cannot be read is a broken run, never a missing one."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_lab.compare.read import Run, read_run
from llama_lab.errors import RunError, no_folder
from llama_lab.rundir import STAGES_FILE, without_waiting

MARKS = {"run.json", "result.json", "metrics.jsonl", ".hydra"}
"""A folder with one of these is a run's."""
INSIDE = {"adapter", "checkpoints", "wandb"}
"""Folders of a run in which no other run lies; hidden ones neither."""
TRIALS = "trials.csv"


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run in or below the folders, each once, in the order of their names; and the folders that cannot be read.

    Raises:
        RunError: a path is not there, or no run lies below any of them.
    """
    paths = [Path(os.path.expanduser(path)) for path in paths]
    unread: list[str] = []
    folders: dict[str, Path] = {}
    for path in paths:
        _check_path(path)
        for folder in _run_folders(path, unread):
            folders.setdefault(os.path.realpath(folder), folder)
    if not folders:
        where = ", ".join(map(str, paths))
        raise RunError(f"No run lies in or below {where}. Runs lie in outputs/; type python -m llama_lab to make one.")
    ordered = sorted(folders.values(), key=_natural)
    runs = [read_run(folder, name) for folder, name in zip(ordered, _names(ordered), strict=True)]
    _tell_limits(runs)
    return runs, unread


def _check_path(path: Path) -> None:
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise RunError(f"{path} is a file, not a folder. Type the folder of a run, or one above it: {path.parent}")
    raise RunError(f"{path}: {no_folder(path)}")


def _run_folders(top: Path, unread: list[str]) -> Iterator[Path]:
    """The folders of runs in `top` and below it; each folder is visited once, also where links go round."""
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                found = {entry.name: entry.is_dir() for entry in entries}
        except OSError as error:
            unread.append(f"{folder}: {error.strerror or error}")
            continue
        is_run = not MARKS.isdisjoint(found) and STAGES_FILE not in found
        if is_run:
            yield folder
        inside = INSIDE if is_run else set()
        waiting += [
            folder / name
            for name, is_folder in found.items()
            if is_folder and not name.startswith(".") and name not in inside
        ]


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Trial 10 comes after trial 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in folder.parts]


def _names(folders: list[Path]) -> list[str]:
    """What the runs are called: their folders from the one on that they have in common."""
    if len(folders) == 1:
        return [str(folders[0])]
    absolute = [os.path.abspath(folder) for folder in folders]
    top = os.path.commonpath(absolute)
    return [os.path.relpath(folder, top) if folder != top else os.path.basename(top) for folder in absolute]


def _tell_limits(runs: list[Run]) -> None:
    """A trial that ended well but beyond a limit of its study is infeasible; only the study's trials.csv knows."""
    states: dict[Path, dict[str, dict[str, str]]] = {}
    for run in runs:
        study = run.folder.parent
        if study not in states:
            states[study] = _trials(study / TRIALS)
        row = states[study].get(run.folder.name)
        if row and row.get("state") == "infeasible" and run.status == "ok":
            run.status, run.note = "infeasible", row.get("error") or "beyond a limit of its study"


def _trials(path: Path) -> dict[str, dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="", opener=without_waiting) as file:
            return {str(row.get("trial")): row for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
