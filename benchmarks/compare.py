"""How long `compare` takes to read and rank 1,000 runs, and how large its page is: folders made here, whole processes.

    python -m benchmarks.compare --runs 5            # prints one JSON line a case
    python -m benchmarks.compare --runs 5 --write    # and writes benchmarks/results/compare.json

Each run has the lock of the embedded default with an uncommitted change of 4 kB, 200 logged steps and three samples.
The files were just written, so they come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, environment, facts
from llama_lab.compose import compose_words
from llama_lab.lock import make_lock
from llama_lab.rundir import RunDir

RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
TARGET_S = 3.0
TARGET_PAGE_BYTES = 5_000_000
NUM_STEPS = 200

CASES: dict[str, tuple[int, list[str]]] = {
    "table": (1000, []),
    "where": (1000, ["--where", "lora.r>=16 and quant=nf4"]),
    "json": (1000, ["--format", "json"]),
    "html": (200, ["--html", "report.html"]),
}
"""Runs that are read, and the words after `compare runs`."""


def write_runs(folder: Path, count: int) -> None:
    """Runs of ten ranks, four seeds each and two quant types; every tenth has failed."""
    draw = random.Random(0)
    lock = make_lock(compose_words([]), ["lora.r=8"], run_id="benchmark")
    lock["code"] = {"commit": "0" * 40, "diff": "".join(f"+line {n} of a change\n" for n in range(170))}
    for number in range(count):
        run = RunDir(folder / "study" / str(number))
        run.path.mkdir(parents=True)
        lock["config"]["lora"]["r"], lock["config"]["seed"] = 4 * (1 + number // 4 % 10), number % 4
        lock["config"]["quant"]["type"] = ("nf4", "fp4")[number // 40 % 2]
        lock["config"]["trainer"]["learning_rate"] = 1e-4 * (1 + number // 80)
        run.write_lock(lock)
        lines = [{"step": n, "train/loss": draw.random(), "eval/loss": draw.random()} for n in range(NUM_STEPS)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.write_samples("".join(f"## prompt {n}\n\nAfter:\n\n```\n{draw.random()}\n```\n\n" for n in range(3)))
        _write_result(run, "failed" if number % 10 == 9 else "ok", draw)


def _write_result(run: RunDir, status: str, draw: random.Random) -> None:
    loss = 1 + draw.random()
    numbers = {"objective": loss, "eval_loss": loss, "perplexity": 2**loss, "tokens_per_s": 900 * draw.random()}
    numbers |= {"peak_memory_gib": 3 + draw.random(), "num_trainable_params": 4_884_480, "train_runtime_s": 60.0}
    told = {"schema": 1, "status": status} | (numbers if status == "ok" else {"error": "ValueError: no"})
    run.result.write_text(json.dumps(told, indent=2))


def measure(case: str, times: int) -> dict[str, Any]:
    """One result: the wall time of whole processes.

    Raises:
        RuntimeError: compare ended badly.
    """
    count, words = CASES[case]
    command = [sys.executable, "-m", "llama_lab", "compare", "runs", *words]
    walls: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        write_runs(Path(name) / "runs", count)
        for _ in range(times):
            start = time.perf_counter()
            done = subprocess.run(command, cwd=name, env=environment(), capture_output=True)
            walls.append(time.perf_counter() - start)
            if done.returncode:
                raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.decode()}")
        page = Path(name) / "report.html"
        size = page.stat().st_size if page.exists() else None
    found = {"case": case, "runs_read": count, "command": " ".join(command[1:]), "times": times}
    found |= {"median_s": round(statistics.median(walls), 2), "max_s": round(max(walls), 2), "page_bytes": size}
    return found | facts("rich", "plotly", "optuna")


def main() -> None:
    """Measure, print one JSON line a case, and keep them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts of each case (default: 5)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(case, args.runs))
        print(json.dumps(rows[-1]))
    if args.write:
        content = {"schema": 1, "target_s": TARGET_S, "target_page_bytes": TARGET_PAGE_BYTES, "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
