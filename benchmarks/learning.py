"""Whether the fast engine of a GPU learns as TRL does: loss curves of the embedded default on real data.

    python -m benchmarks.learning                 # on a GPU: each engine with two seeds, one JSON line a run

The same command for all but engine and seed, as whole runs of their own: dropout on, grouped as by default, every step
logged. The file keeps the curves; docs/render.py says how far the engines are apart, beside how far two seeds are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed_gpu import RESULTS as SPEED
from benchmarks.speed_gpu import add, head

RESULTS = SPEED.with_name("learning.json")
WORDS = [
    *("lora=all_linear", "lora.r=16", "lora.dropout=0.05", "quant=nf4", "dataset.max_train_rows=640"),
    *("dataset.metrics=[exact_match]", "evaluate.metrics_before=false", "trainer.num_train_epochs=1"),
    *("trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "trainer.save_steps=0", "tracking=none"),
]
RUNS = [("fast", 0), ("standard", 0), ("fast", 1), ("standard", 1)]


def main() -> int:
    """Run all, in so many processes at once as there are GPUs, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="runs at once, each on a GPU of its own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case and system are replaced")
    parser.add_argument("words", nargs="*", help="more settings")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, len(RUNS), args.gpus):
            part = RUNS[first : first + args.gpus]
            started = [(run, start(run, gpu, Path(folder), args.words)) for gpu, run in enumerate(part)]
            for run, process in started:
                process.wait()
                row = row_of(run, Path(folder) / "-".join(map(str, run)), args.words)
                print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
                add(args.out, row)
    return 0


def start(run: tuple[str, int], gpu: int, folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """One run as a process; the time at which it began is kept beside it."""
    engine, seed = run
    out = folder / f"{engine}-{seed}"
    out.mkdir()
    (out / "began").write_text(str(time.time()))
    command = [sys.executable, "-m", "llama_lab", *WORDS, f"trainer.engine={engine}", f"seed={seed}", *words]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", str(gpu))}
    return subprocess.Popen([*command, f"hydra.run.dir={out}"], env=env, stdout=sys.stderr)


def row_of(run: tuple[str, int], out: Path, words: list[str]) -> dict[str, Any]:
    """What the files of a run say."""
    engine, seed = run
    result = json.loads((out / "result.json").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "case": f"seed {seed}",
        "system": engine,
        **head(),
        "losses": [row["train/loss"] for row in metrics if "train/loss" in row],
        **{key: result[key] for key in ("eval_loss_before", "eval_loss", "exact_match", "train_runtime_s")},
        **{key: result[key] for key in ("tokens_per_s", "num_steps", "peak_memory_gib")},
        "whole_run_s": round(time.time() - float((out / "began").read_text()), 1),
        "settings": [*WORDS, *words],
        "command": "python -m benchmarks.learning",
    }


if __name__ == "__main__":
    raise SystemExit(main())
