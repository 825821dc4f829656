"""K runs as a user starts them, one after the other, beside one command that stacks them: from start to exit.

    python -m benchmarks.stacked_runs BASE                  # 8 runs of 256, 512 and 1,024 tokens a step; on a GPU
    python -m benchmarks.stacked_runs BASE --tokens 256     # one size

benchmarks/stacked.py measures steps; here importing, loading, quantising, compiling, the held-out loss and saving the
adapter are in the time, too, of both. The same ranks (8, 16, 32 and 64), each with two seeds; 250 steps are those of
experiment=seed_guanaco. Each way begins with an empty compile cache. One after the other are five commands: the
first, which compiles, a second of its rank, which compiles nothing, and one of each other rank, which compiles what is
its own. All further runs count as long as the second, which has the smallest rank: they would take no less time. Prints
one JSON line a way and adds it to the results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed_gpu import add, head, write_rows
from benchmarks.stacked import RANKS, case_of
from benchmarks.stacked import RESULTS as STEPS_RESULTS
from benchmarks.study_runs import Drawn, Timed, one_by_one, run_study
from benchmarks.study_trials import trial_of

RESULTS = STEPS_RESULTS.with_name("stacked_runs.json")
MEMORY = "fast"
ONE_BY_ONE, STACKED = "commands, one after the other", "one stacked command"


def main() -> int:
    """Measure, print a JSON line a way, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a checkpoint")
    parser.add_argument("words", nargs="*", help="more settings of the runs")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 512, 1024], help="tokens a step and run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each rank")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of a run")
    parser.add_argument("--folder", type=Path, help="keep the runs there; whole ones that lie there are only read")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case and system are replaced")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        for tokens in args.tokens:
            folder = (args.folder or Path(temporary)).resolve() / str(tokens)
            folder.mkdir(parents=True, exist_ok=True)
            for row in rows(args, tokens, folder):
                print(json.dumps(row), flush=True)
                add(args.out, row)
    return 0


def rows(args: argparse.Namespace, tokens: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Both ways of one size."""
    file = folder / "rows.jsonl"
    if not file.exists():
        write_rows(file, tokens, int(1.1 * args.steps) + 8)  # 5% are held out, and blocks are not quite full
    words = run_words(args, tokens, file, args.base)
    grid = [f"lora.r={','.join(map(str, RANKS))}", f"seed={','.join(map(str, range(args.seeds)))}"]
    stack = [*words, *grid, "hydra/launcher=stacked", f"hydra.launcher.rows={len(RANKS) * args.seeds}"]
    place = folder / "stacked"
    yield row_of(args, tokens, STACKED, run_study(stack, place, folder / "cache_stacked"), place)
    ranks = (RANKS[0], *RANKS)
    drawn: list[Drawn] = [({}, [f"lora.r={rank}", f"seed={min(i, 1)}"]) for i, rank in enumerate(ranks)]
    place, cache = folder / "one_by_one", folder / "cache_one_by_one"
    runs = one_by_one(words, drawn, range(len(drawn)), place, cache, 1)
    seconds = [run.seconds for run in runs]
    whole = sum(seconds) + (len(RANKS) * args.seeds - len(runs)) * seconds[1]
    timed = Timed(round(whole, 1), runs[0].until_logged_s)
    yield row_of(args, tokens, ONE_BY_ONE, timed, place) | {"run_s": seconds, "ranks_run": list(ranks)}


def run_words(args: argparse.Namespace, tokens: int, file: Path, base: str) -> list[str]:
    """What all runs have in common."""
    return [
        *("model=llama2_7b", f"model.name={base}", "quant=nf4", "lora=all_linear", "lora.dropout=0.05"),
        *("dataset=jsonl", f"dataset.path={file}", "dataset.packing=true", f"dataset.max_length={tokens}"),
        *("dataset.max_eval_rows=16", "dataset.metrics=[]", "evaluate.before=false", "generation.num_prompts=0"),
        *("trainer.per_device_train_batch_size=1", "trainer.max_grad_norm=0.3", f"trainer.max_steps={args.steps}"),
        *("trainer.save_steps=0", f"trainer.memory={MEMORY}", "tracking=none", *args.words),
    ]


def row_of(args: argparse.Namespace, tokens: int, system: str, timed: Timed, place: Path) -> dict[str, Any]:
    """What is known of one way; the tokens a second are those of all runs over all of its time.

    Args:
        place: where the folders of its runs are.
    """
    num_runs = len(RANKS) * args.seeds
    trained = [trial_of(int(file.parent.name), file.parent, {}) for file in place.glob("*/result.json")]
    if any(run.state != "done" or run.num_steps != args.steps for run in trained):
        raise RuntimeError(f"Not all runs in {place} have trained {args.steps} steps.")
    per_run = sum(run.num_tokens for run in trained) / len(trained)
    return {
        "case": f"{case_of(num_runs, tokens, MEMORY)}, runs of {args.steps} steps",
        "system": system,
        **head(),
        "makespan_s": timed.seconds,
        "until_first_logged_s": timed.until_logged_s,
        "tokens_per_step": round(per_run / args.steps, 1),
        "tokens_per_s": round(num_runs * per_run / timed.seconds, 1),
        "step_ms": round(1000 * timed.seconds / args.steps / num_runs, 2),
        "peak_memory_gib": max(run.peak_memory_gib for run in trained),
        "ranks": sorted(RANKS * args.seeds),
        "memory": MEMORY,
        "settings": run_words(args, tokens, Path("rows.jsonl"), "BASE"),
        "command": "python -m benchmarks.stacked_runs BASE",
    }


if __name__ == "__main__":
    raise SystemExit(main())
