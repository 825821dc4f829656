"""How fast K adapters train together on one frozen base: a stack beside the same runs one after the other.

    python -m benchmarks.stacked BASE                               # 8 x 256, 8 x 512 and 8 x 1,024 tokens; on a GPU
    python -m benchmarks.stacked BASE --tokens 256 --memory lean    # one size; the least memory
    python -m benchmarks.stacked BASE --beside 8                    # so many processes side by side on the card
    python -m benchmarks.stacked BASE --peers                       # the same by TRL alone, by peer.py

BASE is a checkpoint of the shape of Llama-2-7B; random weights will do, as speed and memory depend on shapes alone.
Ranks are 8, 16, 32 and 64 in turn, LoRA is on all linear layers with dropout 0.05, the base NF4. Every row trains on
packed blocks of its own order. One after the other means the same rows, each alone in a stack of one; what has the same
rank takes the same time and is measured once. TRL's rows are not packed, and all its ranks are 16. Prints one JSON line
a case and adds it to the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed_gpu import RESULTS as SPEED
from benchmarks.speed_gpu import add, head, peer_numbers, write_rows

RESULTS = SPEED.with_name("stacked.json")
RANKS = (8, 16, 32, 64)
WARM, STEPS = 6, 26
"""Micro-steps before the clock starts, and until it stops; compiling and recording are over by then."""
AFTER = 2
"""Steps more, so that what a row does once, as it ends, is not in the time of a step."""
TRL_SETTINGS = ["gc=0", "targets=all", "r=16", "dropout=0.05"]
TRL_ROW = 256
"""Real tokens of one of its rows, about (peer.py draws them as a chat's)."""


def main() -> int:
    """Measure, print a JSON line a case, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a checkpoint")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 512, 1024], help="tokens a step and row")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--memory", default="balanced", help="trainer.memory of all of them")
    parser.add_argument("--beside", type=int, help="processes side by side instead, each with one row")
    parser.add_argument("--peers", action="store_true", help="TRL one by one, and nothing of ours")
    parser.add_argument("--alone", type=int, help="one row of this rank alone, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case and system are replaced")
    args = parser.parse_args()
    for row in beside(args) if args.beside else peers(args) if args.peers else cases(args):
        print(json.dumps(row), flush=True)
        add(args.out, row)
    return 0


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each size the runs one after the other, then the stack."""
    bench = Bench(args.base, args.memory)
    for tokens in args.tokens:
        case = case_of(args.rows, tokens, args.memory)
        if args.alone:
            yield {"case": case, "system": f"alone, rank {args.alone}", **bench.measured([args.alone], tokens)}
            continue
        ranks = [RANKS[i % len(RANKS)] for i in range(args.rows)]
        alone = {rank: bench.measured([rank], tokens) for rank in sorted(set(ranks))}
        yield {"case": case, "system": "one after the other"} | summed([alone[rank] for rank in ranks])
        together = bench.measured(ranks, tokens)
        speedup = together["tokens_per_s"] / summed([alone[rank] for rank in ranks])["tokens_per_s"]
        yield {"case": case, "system": "stack", **together, "speedup": round(speedup, 2)}


def case_of(num_rows: int, tokens: int, memory: str) -> str:
    """So many rows of so many tokens, and trainer.memory where it is not balanced."""
    return f"{num_rows} x {tokens}" + ("" if memory == "balanced" else f", {memory}")


def peers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """As many runs of TRL one after the other, of which one is measured; they have no trainer.memory."""
    for tokens in args.tokens:
        settings = [*TRL_SETTINGS, f"bs={max(1, tokens // TRL_ROW)}"]
        numbers = peer_numbers(args.base, "trl", settings)
        if numbers is None:
            continue
        yield {
            "case": case_of(args.rows, tokens, args.memory),
            "system": "trl, one by one",
            **head(),
            **summed([numbers] * args.rows),
            "settings": settings,
            "command": "python -m benchmarks.stacked BASE --peers",
        }


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same work done one run after the other."""
    step_ms = sum(row["step_ms"] for row in rows)
    tokens = sum(row["tokens_per_step"] for row in rows)
    return rows[0] | {
        "tokens_per_step": round(tokens, 1),
        "step_ms": round(step_ms, 2),
        "tokens_per_s": round(1000 * tokens / step_ms, 1),
        "peak_memory_gib": max(row["peak_memory_gib"] for row in rows),
    }


class Bench:
    """The base, loaded once, and rows that train on it."""

    def __init__(self, base: str, memory: str) -> None:
        from llama_lab.compose import compose_words
        from llama_lab.lora import add_adapter
        from llama_lab.model import load_base, load_tokenizer

        self.base, self.memory = base, memory
        config = compose_words(self._model_words(RANKS[0]))
        self.tokenizer = load_tokenizer(config.model)
        self.model = add_adapter(load_base(config.model, config.quant, dense=False), config.lora, seed=0)

    def measured(self, ranks: list[int], tokens: int) -> dict[str, Any]:
        """One stack of a row for each rank."""
        import torch

        from llama_lab.choices import Memory
        from llama_lab.engine.stack import Stack

        on_gpu = torch.cuda.is_available()
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            rows = [self.row(i, rank, tokens, Path(folder)) for i, rank in enumerate(ranks)]
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            stack = Stack(
                self.model, num_rows=len(rows), rank=max(ranks), memory=Memory(self.memory), dropout=True, paid=on_gpu
            )
            for row in rows:
                stack.join(row)
            times, counts = _stepped(stack, rows)
            found = _numbers(times, counts, began)
        del stack
        for row in rows:
            if row.error is not None:
                raise row.error
            self.model.delete_adapter(row.name)
        gc.collect()
        return {
            **head(),
            **found,
            "ranks": ranks,
            "memory": self.memory,
            "command": f"python -m benchmarks.stacked BASE --memory {self.memory}",
        }

    def row(self, number: int, rank: int, tokens: int, folder: Path) -> Any:
        """A row with its data and its adapter."""
        from llama_lab.choices import Engine, Memory
        from llama_lab.compose import compose_words
        from llama_lab.data.batches import training_rows
        from llama_lab.data.splits import build_splits
        from llama_lab.engine.row import Row
        from llama_lab.events import Listeners
        from llama_lab.lora import add_named_adapter
        from llama_lab.training import FitSettings

        file, name = folder / "rows.jsonl", f"row{number}"
        if not file.exists():
            write_rows(file, tokens, STEPS + AFTER + 4)
        config = compose_words([*self._words(rank, tokens, file), f"seed={number}"])
        splits = build_splits(config.dataset, self.tokenizer, seed=0)
        train = training_rows(splits.train.tokens, config.dataset)
        add_named_adapter(self.model, name, config.lora, seed=number)
        settings = FitSettings(
            trainer=config.trainer,
            engine=Engine.fast,
            seed=number,
            checkpoints=folder / name,
            autocast_bf16=False,
            memory=Memory(self.memory),
        )
        return Row(self.model, name, self.tokenizer, train, settings, Listeners(), dict)

    def _words(self, rank: int, tokens: int, file: Path) -> list[str]:
        return [
            *self._model_words(rank),
            *("dataset=jsonl", f"dataset.path={file}", "dataset.packing=true", f"dataset.max_length={tokens}"),
            *("dataset.max_eval_rows=2", "trainer.per_device_train_batch_size=1", "trainer.max_grad_norm=0.3"),
            *("trainer.logging_steps=5", f"trainer.max_steps={STEPS + AFTER}", "trainer.save_steps=0"),
        ]

    def _model_words(self, rank: int) -> list[str]:
        model = ["model=llama2_7b", f"model.name={self.base}", "quant=nf4"]
        return [*model, "lora=all_linear", f"lora.r={rank}", "lora.dropout=0.05"]


def _stepped(stack: Any, rows: list[Any]) -> tuple[list[float], list[int]]:
    """When each micro-step was done, and the real tokens of it."""
    import torch

    times: list[float] = []
    counts: list[int] = []
    while not stack.is_empty:
        counts.append(sum(row.micro.stream.num_tokens for row in rows if row.micro))
        stack.step()
        if torch.cuda.is_available() and len(times) in (WARM - 1, STEPS - 1):
            torch.cuda.synchronize()
        times.append(time.monotonic())
    return times[:STEPS], counts[:STEPS]


def _numbers(times: list[float], counts: list[int], began: float) -> dict[str, Any]:
    import torch

    seconds, tokens, steps = times[-1] - times[WARM - 1], sum(counts[WARM:]), len(times) - WARM
    return {
        "tokens_per_step": round(tokens / steps, 1),
        "tokens_per_s": round(tokens / seconds, 1),
        "step_ms": round(1000 * seconds / steps, 2),
        "until_measured_s": round(times[WARM - 1] - began, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0,
    }


def beside(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """So many processes at once, each with one row; their speeds while all of them run are added up."""
    for tokens in args.tokens:
        ranks = [RANKS[i % len(RANKS)] for i in range(args.beside)]
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "benchmarks.stacked", args.base, "--tokens", str(tokens), "--rows", "1"]
            files = [Path(folder) / f"{i}.json" for i in range(args.beside)]
            started = [
                subprocess.Popen([*words, "--memory", args.memory, "--alone", str(rank), "--out", str(file)])
                for rank, file in zip(ranks, files, strict=True)
            ]
            for process in started:
                process.wait()
            rows = [json.loads(file.read_text())["rows"][0] for file in files if file.exists()]
        yield rows[0] | {
            "case": case_of(args.beside, tokens, args.memory),
            "system": f"{len(rows)} of {args.beside} processes side by side",
            "tokens_per_step": round(sum(row["tokens_per_step"] for row in rows), 1),
            "tokens_per_s": round(sum(row["tokens_per_s"] for row in rows), 1),
            "step_ms": max(row["step_ms"] for row in rows),
            "peak_memory_gib": round(sum(row["peak_memory_gib"] for row in rows), 2),
            "ranks": ranks,
            "command": f"python -m benchmarks.stacked BASE --beside {args.beside} --memory {args.memory}",
        }


if __name__ == "__main__":
    raise SystemExit(main())
