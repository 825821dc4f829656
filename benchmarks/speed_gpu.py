"""How fast a GPU trains a Llama-2-7B with QLoRA: whole runs of ours beside TRL and Unsloth on the same card.

    python -m benchmarks.speed BASE                          # our runs; one JSON line a case
    python -m benchmarks.speed BASE --peers                  # TRL's and Unsloth's, by peer.py
    python -m benchmarks.speed BASE --sweep                  # over tokens a step, rank and quant type
    python -m benchmarks.speed BASE --sweep --only rank      # of that, the cases with this in their name
    python -m benchmarks.speed BASE --first-step             # seconds from the command to the first step, twice

BASE is a checkpoint of the shape of Llama-2-7B; random weights will do, as speed and memory depend on shapes alone:
`python -m benchmarks.make_base BASE`.
Rows are random words whose lengths are spread as those of chats (log-normal, about 290 tokens a row), packed; real
tokens count.
A run of ours is `runner.run`: tokenising, logging, schedule, clipping and checkpoints are all in it. Its speed is taken
between two logged steps, after compiling and recording and with one checkpoint between them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from benchmarks.machine import commit
from benchmarks.speed import RESULTS as CPU_RESULTS
from benchmarks.speed_cases import ALL_LINEAR, PEERS, cases, chat_length, packed, sweep

if TYPE_CHECKING:
    from llama_lab.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = CPU_RESULTS.with_name("speed.json")
SWEEP_RESULTS = CPU_RESULTS.with_name("speed_sweep.json")
COMMAND = "python -m benchmarks.speed BASE"
FOLLOWED = 0.5
"""How many words the one before decides, where they are drawn as a language's are."""
FIRST, LAST = 12, 44
"""Logged steps between which is measured; checkpoints are written at 25 and at the end."""
WORDS = [
    "model=llama2_7b",
    "dataset=jsonl",
    "dataset.packing=true",
    "evaluate.before=false",
    "dataset.max_eval_rows=2",
    "dataset.metrics=[]",
    "generation.num_prompts=0",
    "tracking=none",
    "trainer.optim=paged_adamw_32bit",
    "trainer.max_grad_norm=0.3",
    "trainer.logging_steps=4",
    f"trainer.max_steps={LAST}",
]


def main() -> int:
    """Measure, print a JSON line a case, and add the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of a checkpoint")
    parser.add_argument("--peers", action="store_true", help="measure the peers, not us")
    parser.add_argument("--only", default="", help="the system, the case or both, such as 'trl 8192'")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--out", type=Path, help="rows of the same case and system are replaced")
    parser.add_argument("words", nargs="*", help="more settings for our runs")
    args = parser.parse_intermixed_args()
    out = args.out or (SWEEP_RESULTS if args.sweep else RESULTS)
    rows = peer_rows(args) if args.peers else first_steps(args) if args.first_step else our_rows(args)
    for row in rows:
        print(json.dumps(row), flush=True)
        add(out, row)
    return 0


def our_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each of our runs; after one that fails the others are measured first.

    Raises:
        SystemExit: names those that failed.
    """
    failed = []
    for name, words in sweep() if args.sweep else cases():
        if args.only not in name:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:  # one each: checkpoints of rank 256 fill a disk
                row = our_row(name, words, args, Path(folder))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        else:
            yield row
    if failed:
        raise SystemExit(f"Failed: {'; '.join(failed)}. What they raised stands above.")


def our_row(name: str, words: list[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in this process, and what its files say."""
    import torch
    from rich.console import Console

    from llama_lab.compose import compose_words
    from llama_lab.runner import run

    file = folder / "rows.jsonl"
    length, rows = (int(word.split("=")[1]) for word in words[-2:])  # as `packed` wrote them
    write_rows(file, length, rows * (LAST + 4))
    config = compose_words([*WORDS, f"model.name={args.base}", f"dataset.path={file}", *words, *args.words])
    gc.collect()  # what the case before has left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    out = folder / name.replace(" ", "_").replace(",", "")
    result = run(config, out, words, Console(file=sys.stderr))
    found = between(out / "metrics.jsonl")
    level, predicted = planned(config)
    return {
        "case": name,
        "system": "llama_lab",
        **head(),
        **found,
        "peak_memory_gib": round(result["peak_memory_gib"], 2),
        "predicted_gib": round(predicted, 2),
        "memory": level,
        "whole_run_s": round(time.monotonic() - began, 1),
        "settings": [*words, *args.words],
        "command": COMMAND + (" --sweep" if args.sweep else ""),
    }


def planned(config: RunConfig) -> tuple[str | None, float]:
    """The level of trainer.memory that a run takes here, None where TRL trains it; and its predicted peak in GiB."""
    import torch

    from llama_lab.activations import Device
    from llama_lab.cards import USABLE_SHARE
    from llama_lab.memory import estimate, fastest_fit, is_fast
    from llama_lab.model import base_shape

    on_gpu = torch.cuda.is_available()
    room = USABLE_SHARE * (torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 80)
    shape, length = base_shape(config.model), config.dataset.max_length
    peak = estimate(shape, config, length=length, padded=True, room_gib=room).total
    if not is_fast(config, Device.gpu):
        return None, peak
    return str(fastest_fit(shape, config, length=length, room_gib=room)), peak


def between(metrics: Path) -> dict[str, float]:
    """Speed between the two logged steps, and seconds until the first of them."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    logged = {row["step"]: row for row in rows if "train/runtime_s" in row}
    first, last = logged[min(step for step in logged if step >= min(FIRST, max(logged) - 1))], logged[max(logged)]
    seconds = last["train/runtime_s"] - first["train/runtime_s"]
    tokens = [row["train/tokens_per_s"] * row["train/runtime_s"] for row in (first, last)]
    steps = last["step"] - first["step"]
    return {
        "tokens_per_step": round((tokens[1] - tokens[0]) / steps, 1),
        "tokens_per_s": round((tokens[1] - tokens[0]) / seconds, 1),
        "step_ms": round(1000 * seconds / steps, 2),
        "until_measured_s": round(first["train/runtime_s"], 1),
    }


def peer_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each run of a peer; one that fails is printed and left out."""
    for case, system, settings in PEERS:
        if args.only not in (system, case, f"{system} {case}", ""):
            continue
        if (numbers := peer_numbers(args.base, system, settings)) is None:
            continue
        yield {
            "case": case,
            "system": system,
            **head(),
            **numbers,
            "settings": settings,
            "command": f"{COMMAND} --peers",
        }


def peer_numbers(base: str, system: str, settings: list[str]) -> dict[str, float] | None:
    """Run peer.py; None, and its last words on stderr, where it fails."""
    command = [sys.executable, "-m", "benchmarks.peer", system, os.path.abspath(base), *settings, "steps=16", "warm=6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{system} {' '.join(settings)} failed: {done.stderr[-600:]}", file=sys.stderr)
        return None
    result = json.loads(found[-1].removeprefix("RESULT "))
    return {
        "tokens_per_step": result["tok_step"],
        "tokens_per_s": result["tok_s"],
        "step_ms": result["step_ms"],
        "peak_memory_gib": result["peak_gb"],
    }


def first_steps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The command as a process, twice: with a compile cache of its own that is empty, then with what the first left."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", 1024, LAST + 4)
        words = [*WORDS, f"model.name={args.base}", f"dataset.path={folder}/rows.jsonl", *ALL_LINEAR, *packed(1024)]
        command = [sys.executable, "-m", "llama_lab", *words, "trainer.logging_steps=1", *args.words]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        env["PYTHONUNBUFFERED"] = "1"  # else lines come when they are many
        for cache in ("cold", "warm"):
            out, began = Path(folder) / cache, time.monotonic()
            whole = [*command, f"hydra.run.dir={out}"]
            process = subprocess.Popen(whole, env=env, stdout=subprocess.PIPE, text=True, bufsize=1)
            said: list[tuple[float, str]] = []
            Thread(target=_listen, args=(process, began, said), daemon=True).start()
            while process.poll() is None and "train/loss" not in _text(out / "metrics.jsonl"):
                time.sleep(0.05)
            seconds = time.monotonic() - began
            process.wait()
            yield {
                "case": f"first step, compile cache {cache}",
                "system": "llama_lab",
                **head(),
                "until_first_step_s": round(seconds, 1),
                "said_after_s": {line: at for at, line in said if at < seconds},
                "settings": [word for word in words if not word.startswith(("model.name=", "dataset.path="))],
                "command": f"{COMMAND} --first-step",
            }


def _listen(process: subprocess.Popen[str], began: float, said: list[tuple[float, str]]) -> None:
    """Seconds at which each line came, and its beginning."""
    assert process.stdout is not None
    for line in process.stdout:
        said.append((round(time.monotonic() - began, 1), line.strip()[:60]))


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def head() -> dict[str, Any]:
    """Card, versions, and where this is a checkout the commit that was measured, with a + where it was changed."""
    import torch

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"card": card, "versions": {name: found for name in names if (found := version_of(name))}, **commit()}


def version_of(name: str) -> str | None:
    """The installed version, None where it is not there."""
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def write_rows(file: Path, max_length: int, num_blocks: int, *, num_words: int = 0) -> None:
    """Rows of random words for at least so many packed blocks.

    Args:
        num_words: words that come about as often as a language's do, the n-th 1/n as often as the first (Zipf), each of
            which is in half of all cases followed by one and the same, so that there is something to learn; 0 for all
            words, equally often.
    """
    rng, left = random.Random(0), num_blocks * max_length
    words = range(3, 3 + num_words) if num_words else range(3, 32000)
    shares = list(accumulate(1 / n if num_words else 1.0 for n in range(1, len(words) + 1)))
    followed = dict(zip(words, rng.choices(words, cum_weights=shares, k=num_words), strict=False))
    with file.open("w") as out:
        while left > 0:
            length = chat_length(rng, max_length)
            left -= length
            drawn = rng.choices(words, cum_weights=shares, k=length - 2)
            for i in range(1, len(drawn) if followed else 0):
                if rng.random() < FOLLOWED:
                    drawn[i] = followed[drawn[i - 1]]
            out.write(json.dumps({"text": " ".join(f"w{word}" for word in drawn)}) + "\n")


def add(file: Path, row: dict[str, Any]) -> None:
    """The row instead of an older one of its case and system."""
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [other for other in known if (other["case"], other["system"]) != (row["case"], row["system"])]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": 1, "rows": [*kept, row]}, indent=2) + "\n")
    os.replace(partial, file)


if __name__ == "__main__":
    raise SystemExit(main())
