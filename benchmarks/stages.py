"""What the second stage of conf/experiment adds to SFT: whole commands with several seeds, one JSON line a stage.

    python -m benchmarks.stages --device gpu --seeds 0 1 2 --at-once 6 quant=nf4
    python -m benchmarks.stages --device cpu --only sft_then_dpo

The settings of these experiments were chosen by their 48 held-out requests, so what result.json says of those flatters.
Each stage's adapter is therefore asked requests that no run reads: further draws of the sentences in which held-out
requests are put, none of them in a data set that comes with llama_lab, the same for every run. `fresh` holds what was
found there: exact_match, composes, and of the second stage how many requests it gained and lost against the first, and
reward_accuracy and reward_margin, whose reward is log-probability less that of the first stage, in nats.
Runs at once share the card, so their seconds and tokens/s are those of a shared card: each row says at_once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.speed_gpu import RESULTS as SPEED
from benchmarks.speed_gpu import add, head
from llama_lab.lock import cpu_name

RESULTS = SPEED.with_name("stages.json")
EXPERIMENTS = ("sft_then_dpo", "sft_then_grpo")
SEED = "stages"
"""Of the fresh requests."""
FRESH = "fresh.json"
NUMBERS = (
    *("eval_loss_before", "eval_loss", "exact_match", "composes", "reward_accuracy", "reward_margin", "reward"),
    *("num_steps", "tokens_per_s", "peak_memory_gib"),
)
"""Of result.json, by the experiment's own held-out requests; those that a stage has."""


@dataclass(kw_only=True)
class Job:
    """One command."""

    experiment: str
    seed: int
    device: str
    """cpu or gpu."""
    out: Path
    words: list[str]

    @property
    def settings(self) -> list[str]:
        """What is typed after `python -m llama_lab`."""
        return [f"experiment={self.experiment}", f"seed={self.seed}", "tracking=none", *self.words]

    def run(self, *module_and_words: str) -> None:
        """Python on the job's device.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})
        command = [sys.executable, "-m", *module_and_words]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main() -> int:
    """Run all, add a row a stage to the results; 1 where a command failed."""
    args = _arguments()
    if args.score:
        write_fresh(args.score, args.rows)
        return 0
    told, failed = _head(args.device), False
    call = {"at_once": args.at_once, "command": _command(args)}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.at_once) as pool:
        folder = args.keep or Path(temporary)
        folder = folder.resolve()
        jobs = [
            Job(experiment=name, seed=seed, device=args.device, out=folder / f"{name}-{seed}", words=args.words)
            for seed in args.seeds
            for name in args.only
        ]
        for done in as_completed([pool.submit(measured, job, args.rows) for job in jobs]):
            try:
                rows = done.result()
            except subprocess.CalledProcessError as error:
                print(f"{error}:\n{error.stderr[-2000:]}", file=sys.stderr)
                failed = True
                continue
            for row in rows:
                row = row | told | call
                print(json.dumps(row), flush=True)
                add(args.out, row)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", default=list(EXPERIMENTS))
    parser.add_argument("--at-once", type=int, default=1, help="commands at once; on a GPU they share it")
    parser.add_argument("--rows", type=int, default=256, help="fresh requests")
    parser.add_argument("--keep", type=Path, help="folder for the runs; else they are thrown away")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same case and system are replaced")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)  # how this file starts itself
    parser.add_argument("words", nargs="*", help="more settings, such as quant=nf4")
    args = parser.parse_intermixed_args()
    if any("=" not in word for word in args.words):
        parser.error(f"{' '.join(args.words)}: settings read KEY=VALUE")
    return args


def _command(args: argparse.Namespace) -> str:
    """What gives all rows of this call again."""
    seeds = " ".join(map(str, args.seeds))
    only = "" if args.only == list(EXPERIMENTS) else f" --only {' '.join(args.only)}"
    at_once = f" --at-once {args.at_once}" if args.at_once > 1 else ""
    words = "".join(f" {word}" for word in args.words)
    return f"python -m benchmarks.stages --device {args.device}{only} --seeds {seeds}{at_once}{words}"


def _head(device: str) -> dict[str, Any]:
    """Card and versions; of a CPU its name."""
    told = head()
    if device == "gpu" and told["card"] == "none":
        raise SystemExit("There is no GPU here. Type --device cpu.")
    return told | ({"card": f"none; {cpu_name()}, {os.cpu_count()} cores"} if device == "cpu" else {})


def measured(job: Job, num_rows: int) -> list[dict[str, Any]]:
    """Run the command, ask its adapters the fresh requests; a row a stage.

    Raises:
        subprocess.CalledProcessError: one of the two processes failed.
    """
    began = time.monotonic()
    job.run("llama_lab", *job.settings, f"hydra.run.dir={job.out}")
    whole_s = time.monotonic() - began
    job.run("benchmarks.stages", "--score", str(job.out), "--rows", str(num_rows))
    fresh = json.loads((job.out / FRESH).read_text())
    return [row_of(stage, job, fresh[stage.name], whole_s) for stage in stage_folders(job.out)]


def stage_folders(out: Path) -> list[Path]:
    """The runs of a command, in their order."""
    return sorted(path.parent for path in out.glob("*_*/result.json"))


def row_of(stage: Path, job: Job, fresh: dict[str, Any], whole_s: float) -> dict[str, Any]:
    """What the files of one stage say."""
    result, lock = (json.loads((stage / name).read_text()) for name in ("result.json", "run.json"))
    began = time.mktime(time.strptime(lock["created"][:19], "%Y-%m-%dT%H:%M:%S"))
    quant = lock["config"]["quant"]["type"]
    more = [word for word in job.words if not word.startswith("quant=")]  # make a case of their own
    return {
        "case": ", ".join([job.experiment, f"seed {job.seed}", quant, job.device, *more]),
        "system": stage.name.partition("_")[2],
        "compute_dtype": lock["model"]["compute_dtype"],
        **{key: result[key] for key in NUMBERS if result.get(key) is not None},
        "fresh": fresh,
        "train_runtime_s": round(result["train_runtime_s"], 1),
        "stage_s": round((stage / "result.json").stat().st_mtime - began),
        "whole_command_s": round(whole_s, 1),
        "commit": (lock.get("code") or {}).get("commit"),
        "settings": job.settings,
    }


# The fresh requests, asked in a process of their own that ends with the card's memory.


def fresh_rows(num_rows: int) -> list[dict[str, str]]:
    """So many requests with the right command, as `chosen`, and a wrong one, as `rejected`; the same at every call."""
    from llama_lab.data.sample import Deck, Writer
    from llama_lab.data.sample_preference import MISTAKES, wrong_command
    from llama_lab.data.sample_rewards import build_prompts

    seen = {row["prompt"].lower() for rows in _shipped(build_prompts()) for row in rows}
    writer, rng = Writer("valid", Random(SEED)), Random(f"{SEED} mistakes")
    deck = Deck(rng, range(len(MISTAKES)))
    found: list[dict[str, str]] = []
    while len(found) < num_rows:
        row = writer.row()
        if row["prompt"].lower() not in seen:
            seen.add(row["prompt"].lower())
            wrong = wrong_command(row["completion"], deck, rng)
            found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong})
    return found


def _shipped(rewards: dict[str, list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """All rows that come with llama_lab; those of sample_preference ask what sample asks."""
    from llama_lab.data.sample import build

    return [*build().values(), *rewards.values()]


def write_fresh(out: Path, num_rows: int) -> None:
    """Ask each stage the fresh requests, and write what was found into fresh.json of the command's folder."""
    rows, found = fresh_rows(num_rows), {}
    before: dict[str, Any] | None = None
    for stage in stage_folders(out):
        asked = ask(stage, rows)
        found[stage.name] = compared(asked, before)
        before = asked
    (out / FRESH).write_text(json.dumps(found, indent=2) + "\n")


def ask(stage: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Of each row: is the greedy answer right, does it compose; log-probabilities of both commands, (N,), nats."""
    from llama_lab.choices import LossOn
    from llama_lab.config import GenerationSettings
    from llama_lab.data.templates import encode
    from llama_lab.data.turns import ask as chat
    from llama_lab.generate import answer
    from llama_lab.preference_score import log_probabilities
    from llama_lab.rewards import composes, exact_match
    from llama_lab.take.load import load_trained, prepare_verb
    from llama_lab.take.source import open_source

    source = open_source(stage)
    prepare_verb(source.config)
    model, tokenizer = load_trained(source)
    settings = source.config.evaluate
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, do_sample=False)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    given = answer(model, tokenizer, prompts, greedy, batch_size=8 * settings.batch_size)
    found: dict[str, Any] = {
        "exact_match": [exact_match("", g, row["chosen"]) for g, row in zip(given, rows, strict=True)],
        "composes": [composes("", g, "") for g in given],
    }
    for name in ("chosen", "rejected"):
        chats = [{"messages": chat(row["prompt"], row[name])} for row in rows]
        encoded = [encode(one, tokenizer, LossOn.completion) for one in chats]
        found[name] = log_probabilities(model, tokenizer, encoded, settings.batch_size)
    return found


def compared(asked: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Shares of the fresh requests; with the stage before also what changed."""
    num_rows = len(asked["exact_match"])
    found: dict[str, Any] = {"num_rows": num_rows}
    for name in ("exact_match", "composes"):
        found[name] = sum(asked[name]) / num_rows
        if before is not None:
            pairs = list(zip(before[name], asked[name], strict=True))
            found[f"{name}_gained"] = sum(new > old for old, new in pairs)
            found[f"{name}_lost"] = sum(new < old for old, new in pairs)
    if before is not None:
        margins = (asked["chosen"] - before["chosen"]) - (asked["rejected"] - before["rejected"])
        found["reward_accuracy"] = float((margins > 0).float().mean())
        found["reward_margin"] = float(margins.mean())
    return found


if __name__ == "__main__":
    raise SystemExit(main())
