"""Where the time of one step of the fast engine goes on a GPU, kernel by kernel.

    python -m benchmarks.step_profile BASE                    # the cases of docs/speed.md; one JSON line each
    python -m benchmarks.step_profile BASE --case fast:2048   # one: trainer.memory and tokens of a step
    python -m benchmarks.step_profile BASE --case fast:8x256  # of a stack of 8 rows

BASE is a checkpoint of the shape of Llama-2-7B. LoRA has r=16 on all linear layers with dropout 0.05; in a stack the
ranks of benchmarks/stacked.py. The whole step is timed without the profiler; the kernels come from one more step with
it, without those that take less than a thousandth.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed_gpu import RESULTS as SPEED
from benchmarks.speed_gpu import add, head
from benchmarks.stacked import RANKS, STEPS, WARM, Bench
from llama_lab.choices import Memory
from llama_lab.engine.stack import Stack

RESULTS = SPEED.with_name("speed_profile.json")
CASES = ("fast:8192", "fast:2048", "lean:1024", "fast:256", "fast:8x256")
RANK = 16
TIMED = 8
"""Steps in each of two turns, of which the faster one counts."""
LEAST_SHARE = 0.001
"""Of all kernels' time, from which on a kernel is listed."""


def main() -> int:
    """Measure, print a JSON line a case, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a checkpoint")
    parser.add_argument("--case", nargs="*", default=list(CASES), help="such as fast:2048 or fast:8x256")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case are replaced")
    args = parser.parse_args()
    bench = Bench(args.base, "fast")
    for case in args.case:
        memory, _, tokens = case.partition(":")
        num_rows, _, tokens = tokens.rpartition("x")
        row = profiled(bench, Memory(memory), int(tokens), int(num_rows or 1))
        print(json.dumps({key: value for key, value in row.items() if key != "kernels"}), flush=True)
        add(args.out, row)
    return 0


def profiled(bench: Bench, memory: Memory, tokens: int, num_rows: int) -> dict[str, Any]:
    """A row alone, or a stack of them: its step, and what is in it."""
    on_gpu = torch.cuda.is_available()
    ranks = [RANK] if num_rows == 1 else [RANKS[i % len(RANKS)] for i in range(num_rows)]
    with tempfile.TemporaryDirectory() as folder:
        rows = [bench.row(i, rank, tokens, Path(folder)) for i, rank in enumerate(ranks)]
        stack = Stack(bench.model, num_rows=num_rows, rank=max(ranks), memory=memory, dropout=True, paid=on_gpu)
        for row in rows:
            stack.join(row)
        for _ in range(WARM):
            stack.step()
        step_ms = min(_timed(stack) for _ in range(2))
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
            stack.step()
            _wait()
        while not stack.is_empty:
            stack.step()
    del stack
    for row in rows:
        if row.error is not None:
            raise row.error
        bench.model.delete_adapter(row.name)
    gc.collect()
    return {
        "case": _case(tokens, memory, num_rows),
        "system": "llama_lab",
        **head(),
        "step_ms": round(step_ms, 2),
        **_kernels(profile, on_gpu),
        "command": "python -m benchmarks.step_profile BASE",
    }


def _case(tokens: int, memory: Memory, num_rows: int) -> str:
    rows, of = ("", "the fast engine alone") if num_rows == 1 else (f"{num_rows} x ", "a stack")
    return f"{rows}{tokens} tokens, trainer.memory={memory}, one step of {of}"


def _timed(stack: Stack) -> float:
    """Milliseconds of a step, without the profiler."""
    _wait()
    began = time.monotonic()
    for _ in range(TIMED):
        stack.step()
    _wait()
    return 1000 * (time.monotonic() - began) / TIMED


def _kernels(profile: Any, on_gpu: bool) -> dict[str, Any]:
    found = [
        {
            "kernel": event.key,
            "ms": round((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000, 3),
            "calls": event.count,
        }
        for event in profile.key_averages()
    ]
    total = sum(kernel["ms"] for kernel in found)
    listed = sorted((k for k in found if k["ms"] >= LEAST_SHARE * total), key=lambda kernel: -kernel["ms"])
    return {"kernels_ms": round(total, 2), "launches": sum(k["calls"] for k in found), "kernels": listed}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


assert WARM + 2 * TIMED + 1 <= STEPS, "a row of benchmarks.stacked has too few steps"

if __name__ == "__main__":
    raise SystemExit(main())
