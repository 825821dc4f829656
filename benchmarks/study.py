"""What a whole study costs: search=lora_quant stacked and halved, beside its points trained one by one.

    python -m benchmarks.study BASE                                # both ways on a GPU; a JSON line each
    python -m benchmarks.study BASE --part one_by_one --gpus 8     # eight at a time, on a GPU each
    python -m benchmarks.study --embedded                          # SmolLM2 on the data set `sample`
    python -m benchmarks.study BASE --trials 9 --steps 81 hydra.launcher.rows=8   # other sizes, more settings

BASE is a checkpoint of the shape of Llama-2-7B. With random weights it learns from rows of random words how often each
comes, which follows Zipf's law as a language's words do, and which word often follows another; the work is a real
one's. Stacked is the command as a user types it, from its start to its exit: the stacked launcher, successive halving
of factor 3, and the random sampler, so that both ways train the same points. One by one is a plain run a point, each
whole, each in a process of its own, by the fast engine as well. Its time is the sum of the wall times of the processes,
which is what one GPU would take; the first has the machine to itself and fills the compile cache. Each way begins with
an empty compile cache, or with the one that --cache names: cache_stacked in the --folder of an earlier call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed_gpu import RESULTS as SPEED
from benchmarks.speed_gpu import add, head, write_rows
from benchmarks.study_runs import Drawn, Timed, one_by_one, points, run_study
from benchmarks.study_trials import Trial, keep, study_trials, trial_of
from llama_lab.sweep.slots import has_gpu

RESULTS = SPEED.with_name("study.json")
STACKED, ONE_BY_ONE = "stacked, successive halving", "one by one, whole"
FACTOR = 3
WORDS = 5_000
"""That the rows of a 7B are made of: how often each comes is what there is to learn."""
SHARED = [
    "search=lora_quant",
    "quant=choice(nf4,fp4,none)",  # int8 is left to TRL's trainer, half a second a step
    *("tracking=none", "trainer.save_steps=0"),
]
OF_7B = [
    *("model=llama2_7b", "lora=all_linear", "dataset=jsonl", "dataset.packing=true", "dataset.max_eval_rows=16"),
    *("trainer.per_device_train_batch_size=1", "trainer.max_grad_norm=0.3", "trainer.memory=fast"),
]
OF_EMBEDDED = ["dataset=sample", "dataset.max_train_rows=null"]


def main() -> int:
    """Measure, print a JSON line a way, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="BASE, unless --embedded; and more settings of the runs")
    parser.add_argument("--embedded", action="store_true", help="the embedded default instead of a 7B")
    parser.add_argument("--part", choices=["stacked", "one_by_one", "both"], default="both")
    parser.add_argument("--gpus", type=int, default=1, help="of one_by_one: runs at once, each on a GPU of its own")
    parser.add_argument(
        "--one-of-each", action="store_true", help="of one_by_one: one run for each way to store a base"
    )
    parser.add_argument("--tokens", type=int, default=512, help="of a 7B: tokens a step and row")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--steps", type=int, default=729, help="optimizer steps of a whole trial")
    parser.add_argument("--first-rung", type=int, help="steps until trials are first compared (default: a 27th)")
    parser.add_argument(
        "--cache",
        type=lambda given: Path(given).resolve(),
        help="begin with this compile cache instead of an empty one a way",
    )
    parser.add_argument("--folder", type=Path, help="keep the runs there; whole ones that lie there are only read")
    parser.add_argument("--keep", type=Path, help="copy the small files of the study there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case and system are replaced")
    args = parser.parse_intermixed_args()
    if args.cache and not any(args.cache.glob("*/*")):
        parser.error(f"--cache {args.cache} has nothing in it; FOLDER/cache_stacked of an earlier --folder FOLDER has")
    if not args.embedded and (not args.words or "=" in args.words[0]):
        parser.error("type BASE, the folder of a checkpoint, or --embedded")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows(args, folder):
            print(json.dumps({key: value for key, value in row.items() if key != "record"}), flush=True)
            add(args.out, row)
    return 0


def rows(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each way that is asked for."""
    words = run_words(args, folder)
    drawn = points(words, args.trials)
    if args.part != "one_by_one":
        place, own = folder / "stacked", study_words(args)
        timed = run_study([*words, *own], place, args.cache or folder / "cache_stacked")
        if args.keep:
            bases = {} if args.embedded else {args.words[0]: "BASE"}
            keep(place, args.keep, {str(place): "outputs/lora_quant", **bases, f"{folder}/": ""})
        trials = study_trials(place, drawn)
        yield row_of(args, STACKED, trials, timed, [*words, *own], "the study's process, from start to exit")
    if args.part != "stacked":
        yield one_by_one_row(args, words, drawn, folder)


def one_by_one_row(args: argparse.Namespace, words: list[str], drawn: list[Drawn], folder: Path) -> dict[str, Any]:
    """All points; or the first of all, which compiles, and one of each way to store the base, as long as its others."""
    place, quants = folder / "one_by_one", [point["quant"] for point, _ in drawn]
    numbers = list(range(len(drawn)))
    if args.one_of_each:
        numbers = [0, *sorted({quant: n for n, quant in reversed(list(enumerate(quants))) if n}.values())]
    runs = one_by_one(words, drawn, numbers, place, args.cache or folder / "cache_one_by_one", args.gpus)
    seconds = sum(run.seconds for run in runs)
    said = f"the sum of the wall times of {len(runs)} processes"
    said += f", {args.gpus} at a time on a GPU each" if has_gpu() else ""
    if args.one_of_each:
        by_quant = {quants[n]: run.seconds for n, run in zip(numbers[1:], runs[1:], strict=True)}
        seconds = runs[0].seconds + sum(by_quant[quant] for quant in quants[1:])
        said = (
            f"the sum of the wall times of {len(drawn)} processes, of which the first and one for each way to store "
            "the base were run and the others count as long"
        )
    trials = [trial_of(number, place / str(number), drawn[number][0]) for number in numbers]
    timed = Timed(seconds, runs[0].until_logged_s)
    return row_of(args, ONE_BY_ONE, trials, timed, words, said) | {
        "until_first_logged_s": [run.until_logged_s for run in runs],
        "run_s": [run.seconds for run in runs],
        "measured_points": numbers,
    }


def run_words(args: argparse.Namespace, folder: Path) -> list[str]:
    """What all runs have in common, and the search."""
    if args.embedded:
        return [*SHARED, *OF_EMBEDDED, f"trainer.max_steps={args.steps}", *args.words]
    base, *more = args.words
    file = folder / "rows.jsonl"
    if not file.exists():
        # 5% are held out, and blocks are not quite full
        write_rows(file, args.tokens, int(1.1 * args.steps) + 8, num_words=WORDS)
    own = [f"model.name={base}", f"dataset.path={file}", f"dataset.max_length={args.tokens}"]
    return [*SHARED, *OF_7B, *own, f"trainer.max_steps={args.steps}", *more]


def study_words(args: argparse.Namespace) -> list[str]:
    """What the study has beside that."""
    rung = args.first_rung or max(1, args.steps // FACTOR**3)
    return [
        *("hydra/launcher=stacked", "hydra/sweeper/sampler=random", f"hydra.sweeper.n_trials={args.trials}"),
        *(f"hydra.sweeper.pruner.reduction_factor={FACTOR}", f"hydra.sweeper.pruner.min_resource={rung}"),
    ]


def row_of(
    args: argparse.Namespace, system: str, trials: list[Trial], timed: Timed, words: list[str], measured: str
) -> dict[str, Any]:
    """What is known of one way; the tokens a second are those of all trials over all of its time."""
    size = "embedded" if args.embedded else f"{args.tokens} tokens"
    steps, tokens = sum(trial.num_steps for trial in trials), sum(trial.num_tokens for trial in trials)
    if len(trials) < args.trials:  # the others are like them
        steps, tokens = args.steps * args.trials, round(tokens / steps * args.steps * args.trials)
    done = sorted((t for t in trials if t.state == "done"), key=lambda t: t.loss or 0.0)
    states = [trial.state for trial in trials]
    return {
        "case": f"{size}, {args.trials} points of {args.steps} steps" + (", kernels compiled" if args.cache else ""),
        "system": system,
        **head(),
        "cpus": os.cpu_count(),
        "makespan_s": round(timed.seconds, 1),
        "measured": measured,
        "until_first_logged_s": timed.until_logged_s,
        "optimizer_steps": steps,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "winner": done[0].as_json() if done and len(trials) == args.trials else None,
        "tokens_per_step": round(tokens / max(1, steps), 1),
        "tokens_per_s": round(tokens / timed.seconds, 1),
        "peak_memory_gib": max((t.peak_memory_gib for t in done), default=None),
        "settings": [_shown(word, args) for word in words],
        "command": "python -m benchmarks.study " + ("--embedded" if args.embedded else "BASE"),
        "record": [trial.as_json() for trial in trials],
    }


def _shown(word: str, args: argparse.Namespace) -> str:
    """A word without the folders of this machine."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if key in ("dataset.path", "model.name") else word


if __name__ == "__main__":
    sys.exit(main())
