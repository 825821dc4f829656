"""How fast a run trains: the fast engine beside TRL, PEFT and bitsandbytes alone, whole commands in turn.

    python -m benchmarks.speed --cpu            # the embedded default; prints one JSON line a case
    python -m benchmarks.speed --cpu --write    # and writes benchmarks/results/speed_cpu.json
    python -m benchmarks.speed BASE --sweep     # on a GPU: all but --cpu is speed_gpu.py's; its options: BASE --help

Both engines train the same rows in the same batches. The speed is that of the run's result.json: real tokens by seconds
of the whole training loop, logging and checkpoints included, loading and measuring left out. The median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import commit
from llama_lab.lock import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed_cpu.json"
SYSTEMS = {"llama_lab": "fast", "trl": "standard"}
WORDS = [
    "dataset.max_train_rows=80",
    "dataset.max_eval_rows=4",
    "dataset.metrics=[]",
    "generation.num_prompts=0",
    "evaluate.before=false",
    "tracking=none",
]
TARGET_RATIO = 2.0


def main() -> int:
    """Measure and print; 1 where the target is missed. Without --cpu what speed_gpu.py measures."""
    if "--cpu" not in sys.argv[1:] and sys.argv[1:] not in (["-h"], ["--help"], []):
        from benchmarks.speed_gpu import main as on_gpu

        return on_gpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", required=True, help="the embedded default on this CPU")
    parser.add_argument("--runs", type=int, default=3, help="of each system, in turn")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("words", nargs="*", help="more settings for both")
    args = parser.parse_intermixed_args()
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for _ in range(args.runs):
        for system, engine in SYSTEMS.items():
            found[system].append(train([*WORDS, *args.words, f"trainer.engine={engine}"]))
    rows = [row_of(system, results, [*WORDS, *args.words]) for system, results in found.items()]
    ratio = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    for row in rows:
        row["against_trl"] = round(row["tokens_per_s"] / rows[1]["tokens_per_s"], 2)
        print(json.dumps(row))
    print(f"llama_lab trains {ratio:.2f} times as fast as TRL alone; the target is {TARGET_RATIO:g}.")
    if args.write:
        RESULTS.write_text(json.dumps({"schema": 1, "target_ratio": TARGET_RATIO, "rows": rows}, indent=2) + "\n")
    return 0 if ratio >= TARGET_RATIO else 1


def train(words: list[str]) -> dict[str, Any]:
    """result.json of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llama_lab", f"hydra.run.dir={folder}/run", *words]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "run" / "result.json").read_text())


def row_of(system: str, results: list[dict[str, Any]], words: list[str]) -> dict[str, Any]:
    """One case of the results file."""
    speeds = [result["tokens_per_s"] for result in results]
    middle = min(results, key=lambda result: abs(result["tokens_per_s"] - statistics.median(speeds)))
    tokens = middle["tokens_per_s"] * middle["train_runtime_s"] / middle["num_steps"]
    return {
        "case": "default",
        "system": system,
        "card": f"none; {cpu_name()}, {os.cpu_count()} cores",
        "tokens_per_step": round(tokens, 1),
        "tokens_per_s": round(middle["tokens_per_s"], 1),
        "runs_tokens_per_s": [round(speed, 1) for speed in speeds],
        "step_ms": round(1000 * middle["train_runtime_s"] / middle["num_steps"], 1),
        "peak_memory_gib": round(middle["peak_memory_gib"], 2),
        "eval_loss": middle["eval_loss"],
        "settings": [*words, f"trainer.engine={SYSTEMS[system]}"],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "command": "python -m benchmarks.speed --cpu --write",
        **commit(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
