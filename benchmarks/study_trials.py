"""What the files of a study, or of runs on the same points, say of each trial."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study_runs import BEGAN, ROOT, SAID, Drawn

STATES = {"ok": "done", None: "failed"}
SMALL = 300_000
"""Bytes up to which a file is kept."""
KEPT = ("*.csv", "*.yaml", SAID, "stack-*.log", "*/result.json", "*/metrics.jsonl", "*/output.log")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point, trained whole or not."""

    number: int
    point: Mapping[str, Any]
    state: str
    """done, pruned, infeasible or failed."""
    num_steps: int
    loss: float | None
    """Held-out loss at the end of a whole trial."""
    curve: Sequence[tuple[int, float]]
    """(step, held-out loss)."""
    num_tokens: int
    """Real tokens that it was trained on; after the last logged step counted as before it."""
    peak_memory_gib: float
    """Of its process."""
    ready_s: float | None = None
    """From the beginning of all until base and adapter were there."""
    ended_s: float | None = None
    """Until its result was written."""

    def as_json(self) -> dict[str, Any]:
        """For a row of the results."""
        return asdict(self)


def study_trials(place: Path, drawn: Sequence[Drawn]) -> list[Trial]:
    """The trials of a finished study.

    Raises:
        RuntimeError: it has drawn other points.
    """
    with (place / "trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, (point, _) in zip(lines, drawn, strict=True):
        other = {key: (line[key], value) for key, value in point.items() if line[key] != str(value)}
        if other:
            raise RuntimeError(f"Trial {line['trial']} of the study is another point: {other}")
    found = [trial_of(number, place / str(number), point, place / BEGAN) for number, (point, _) in enumerate(drawn)]
    assert [trial.state for trial in found] == [line["state"] for line in lines]
    return found


def trial_of(number: int, folder: Path, point: Mapping[str, Any], began: Path | None = None) -> Trial:
    """A run by its files.

    Args:
        began: a file as old as all of it; None leaves out when things were.
    """
    result = _read(folder / "result.json")
    file = folder / "metrics.jsonl"
    logged = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    trained = [row for row in logged if "train/runtime_s" in row]
    last = trained[-1] if trained else None
    num_steps = int(result.get("num_steps") or (last["step"] if last else 0))
    per_step = last["train/tokens_per_s"] * last["train/runtime_s"] / last["step"] if last else 0.0
    return Trial(
        number=number,
        point=dict(point),
        state=STATES.get(result.get("status"), str(result.get("status"))),
        num_steps=num_steps,
        loss=result.get("eval_loss") if result.get("status") == "ok" else None,
        curve=[(row["step"], round(row["eval/loss"], 6)) for row in logged if "eval/loss" in row],
        num_tokens=round(per_step * num_steps),
        peak_memory_gib=round(last["train/peak_memory_gib"], 2) if last else 0.0,
        ready_s=_after(began, folder / "run.json"),
        ended_s=_after(began, folder / "result.json"),
    )


def _after(began: Path | None, file: Path) -> float | None:
    """Seconds between the last changes of two files."""
    if began is None or not began.exists() or not file.exists():
        return None
    return round(file.stat().st_mtime - began.stat().st_mtime, 1)


def keep(place: Path, to: Path, names: Mapping[str, str]) -> None:
    """Copy the small files of a study, and what `compare` says of its trials.

    Args:
        names: what stands in the copies instead of folders of this machine.
    """
    command = [sys.executable, "-m", "llama_lab", "compare", str(place), "--format", "markdown"]
    compared = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    files = {file.relative_to(place): file for pattern in KEPT for file in place.glob(pattern)}
    texts = {name: file.read_text() for name, file in files.items() if file.stat().st_size <= SMALL}
    for name, text in (texts | {Path("compare.md"): compared}).items():
        for folder, said in names.items():
            text = text.replace(folder, said)
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}
