"""The processes of benchmarks/study.py, and how long they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from omegaconf import OmegaConf

from llama_lab.paths import CONF_DIR

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.05
SAID = "said.txt"
SECONDS = "seconds.json"
"""Beside a run's own files: how long its process took, and with which words."""
BEGAN = "began"
"""An empty file, as old as the process."""
Drawn = tuple[dict[str, Any], list[str]]
"""A point by its settings, and as words for Hydra."""


@dataclass(frozen=True)
class Timed:
    """A process from its start to its end."""

    seconds: float
    until_logged_s: float | None
    """Until a run in it had logged its first steps (trainer.logging_steps); None where none did."""


def points(words: Sequence[str], num: int) -> list[Drawn]:
    """The first points of search=lora_quant with the random sampler, drawn by the study's own code.

    Args:
        words: settings of the study; those that stand for several values change its space.
    """
    from optuna.storages import InMemoryStorage

    from llama_lab.sweep.methods import PrunerName, PrunerSettings, SamplerName, SamplerSettings
    from llama_lab.sweep.settings import Direction, SweepSettings
    from llama_lab.sweep.space import parse_space
    from llama_lab.sweep.study import open_study

    sweeper = OmegaConf.load(CONF_DIR / "search" / "lora_quant.yaml").hydra.sweeper
    space = parse_space(dict(sweeper.params), [word for word in words if not word.startswith("hydra")])
    settings = SweepSettings(
        sampler=SamplerSettings(name=SamplerName.random), pruner=PrunerSettings(name=PrunerName.none)
    )
    given = [space.check_baseline(point) for point in sweeper.baselines]
    study = open_study(
        "points", InMemoryStorage(), settings, space, directions=[Direction.minimize], n_trials=num, given=given
    )
    found = [study.claim() for _ in range(num)]
    return [(dict(claim.point), space.words(claim.point)) for claim in found if claim]


def run_study(words: Sequence[str], place: Path, cache: Path) -> Timed:
    """The study as a user types it, on one GPU; one of these words that has ended there is only read.

    Raises:
        RuntimeError: it has ended with an error; what it said lies in `place`.
    """
    if kept := _kept(place, words):
        return kept
    _begin(place)
    command = ["-m", f"hydra.sweep.dir={place}", *words]
    said = place / SAID
    timed, code = _timed(command, said, environment(cache, _gpus(1)[0]), lambda: list(place.glob("*/metrics.jsonl")))
    if code:
        raise RuntimeError(f"The study ended with {code}: {said.read_text()[-2000:]}")
    _keep(place, words, timed)
    return timed


def one_by_one(
    words: Sequence[str], drawn: Sequence[Drawn], numbers: Sequence[int], place: Path, cache: Path, num_gpus: int
) -> list[Timed]:
    """A plain run for each of these points, so many at a time on a GPU each; those that have ended are only read.

    Raises:
        RuntimeError: a run has ended with an error; what it said lies in its folder.
    """
    of_study = ("hydra", "choice(", "interval(")
    fixed = [word for word in words if not any(part in word for part in of_study)]
    gpus: SimpleQueue[str | None] = SimpleQueue()
    for gpu in _gpus(num_gpus):
        gpus.put(gpu)

    def work(number: int) -> Timed:
        out, gpu = place / str(number), gpus.get()
        try:
            return _run([*fixed, *drawn[number][1]], out, environment(cache, gpu))
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(num_gpus) as pool:
        first = work(numbers[0])  # alone, so that what all of them need is compiled once
        return [first, *pool.map(work, numbers[1:])]


def _run(words: Sequence[str], out: Path, env: dict[str, str]) -> Timed:
    if kept := _kept(out, words):
        return kept
    _begin(out)
    timed, code = _timed([f"hydra.run.dir={out}", *words], out / SAID, env, lambda: [out / "metrics.jsonl"])
    print(f"run {out.name}: {timed.seconds:.1f} s, exit code {code}", file=sys.stderr, flush=True)
    if code:
        raise RuntimeError(f"Run {out.name} ended with {code}: {(out / SAID).read_text()[-2000:]}")
    _keep(out, words, timed)
    return timed


def _kept(folder: Path, words: Sequence[str]) -> Timed | None:
    """How long it took before; None where it has not ended, or was another run."""
    file = folder / SECONDS
    said = json.loads(file.read_text()) if file.exists() else {}
    return Timed(**said["timed"]) if said.get("words") == list(words) else None


def _keep(folder: Path, words: Sequence[str], timed: Timed) -> None:
    (folder / SECONDS).write_text(json.dumps({"words": list(words), "timed": asdict(timed)}))


def _begin(folder: Path) -> None:
    """Make an empty folder; what is there (killed half-way, which is no time, or of other settings) is put aside."""
    if folder.exists():
        number = sum(1 for _ in folder.parent.glob(f"{folder.name}.aside*"))
        folder.rename(folder.with_name(f"{folder.name}.aside{number}"))
    folder.mkdir(parents=True)
    (folder / BEGAN).touch()


def _timed(
    words: Sequence[str], said: Path, env: dict[str, str], metrics: Callable[[], list[Path]]
) -> tuple[Timed, int]:
    """`python -m llama_lab` with these words: how long it took, and its exit code."""
    command, logged = [sys.executable, "-m", "llama_lab", *words], None
    with said.open("w") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=said.parent, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if logged is None and any(_has_logged(file) for file in metrics()):
                    logged = round(time.monotonic() - began, 1)
                time.sleep(POLL_S)
        finally:
            process.terminate()
        return Timed(round(time.monotonic() - began, 1), logged), process.wait()


def _has_logged(file: Path) -> bool:
    return file.exists() and "train/loss" in file.read_text()


def _gpus(num: int) -> list[str | None]:
    """The first GPUs by their names; None for each on a machine without one.

    Raises:
        RuntimeError: there are not so many.
    """
    from llama_lab.sweep.slots import visible_gpus

    found = visible_gpus()
    if not found:
        return [None] * num
    if len(found) < num:
        raise RuntimeError(f"--gpus {num}: this machine has {len(found)}.")
    return list(found[:num])


def environment(cache: Path, gpu: str | None) -> dict[str, str]:
    """A process's environment: one GPU, and a compile cache of its own."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    return os.environ | own | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
