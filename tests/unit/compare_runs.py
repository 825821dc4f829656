"""Folders of runs as `runner` leaves them, with numbers of the test's own."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from llama_lab.compose import compose_words
from llama_lab.lock import make_lock

NUMBERS: dict[str, Any] = {
    "eval_loss_before": 5.0,
    "train_loss": 2.0,
    "train_runtime_s": 61.0,
    "tokens_per_s": 1234.5,
    "peak_memory_gib": 3.25,
    "num_trainable_params": 4096,
    "num_params": 1_000_000,
    "num_steps": 20,
}


@cache
def tiny_lock() -> dict[str, Any]:
    return json.loads(json.dumps(make_lock(compose_words(["model=tiny"]), ["model=tiny"], run_id="abc")))


def make_run(
    folder: Path,
    eval_loss: float | None = 1.0,
    *,
    status: str = "ok",
    error: str | None = None,
    steps: int = 4,
    lock: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run that ended with this held-out loss; settings as `lora__r=8`; eval_loss=None leaves result.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    locked = copy.deepcopy(tiny_lock()) | (lock or {})
    for name, value in settings.items():
        group, _, key = name.rpartition("__")
        (locked["config"][group] if group else locked["config"])[key] = value
    (folder / "run.json").write_text(json.dumps(locked, indent=2))
    lines = [{"step": n, "train/loss": 3 - n / 10} for n in range(1, steps)] + [{"step": steps, "eval/loss": eval_loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if eval_loss is not None:
        numbers = NUMBERS | {"objective": eval_loss, "eval_loss": eval_loss, "perplexity": 2.718**eval_loss}
        numbers = numbers if status == "ok" else {}
        whole = {"schema": 1, "status": status, **numbers, **(result or {}), "error": error}
        (folder / "result.json").write_text(json.dumps(whole, indent=2))
    return folder
