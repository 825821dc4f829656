"""What a study costs beside training, and what ending bad trials early saves.

    python -m benchmarks.sweep overhead --write      # ms a trial without training: Optuna, Hydra's grid, our study
    python -m benchmarks.sweep halving --write       # search=lora_quant of the embedded default, whole and pruned
    python -m benchmarks.sweep halving model=tiny    # ... of other settings

Prints one JSON line a case; --write keeps them in benchmarks/results/sweep_CASE.json. The overhead is the slope between
few and many trials, so what a start costs once is left out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_lab.lock import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET_MS = 150
"""Issue 4: what our study may add to a job of Hydra's."""
FEW, MANY = 4, 24
SYSTEMS = ("optuna_memory", "optuna_journal", "hydra_grid", "study")
PRUNERS = ("none", "successive_halving")


def nothing(order: Any, pipe: Any) -> None:
    """A trial that does not train: what its process writes at its end, and nothing else."""
    from llama_lab.rundir import RunDir

    result = {"schema": 1, "status": "ok", "eval_loss": 1.0, "num_steps": 1, "error": None}
    RunDir(order.folder).result.write_text(json.dumps(result))


def run_optuna(num: int, storage: str | None) -> None:
    """Ask and tell, with the space of lora_quant's size."""
    import optuna

    from llama_lab.sweep.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=open_storage(storage) if storage else None)
    for _ in range(num):
        trial = study.ask()
        trial.suggest_categorical("lora.r", [8, 16, 32, 64])
        trial.suggest_float("trainer.learning_rate", 3e-5, 1e-3, log=True)
        study.tell(trial, 1.0)


def run_hydra_grid(num: int) -> None:
    """Hydra's own sweeper and launcher on llama_lab's tree, with a job that does nothing."""
    from llama_lab import app

    app.job = lambda cfg: 1.0  # type: ignore[assignment]
    app.check_grid = lambda *_: None  # ours, not Hydra's
    app.launch(["-m", "model=tiny", f"seed={','.join(map(str, range(num)))}", "lora.r=8"])


def run_study(num: int) -> None:
    """Our sweeper on the same tree, each trial in a process of its own that does nothing."""
    from llama_lab import app
    from llama_lab.sweep import driver

    driver.TrialTask = functools.partial(driver.TrialTask, work=nothing)  # type: ignore[misc, assignment]
    space = ["lora.r=choice(8,16,32,64)", "trainer.learning_rate=tag(log,interval(3e-5,1e-3))"]
    app.launch(["-m", "hydra/sweeper=optuna", "model=tiny", f"hydra.sweeper.n_trials={num}", *space])


def run_system(system: str, num: int) -> None:
    """Do `num` trials of a system in this process; prints the seconds they took."""
    began = time.perf_counter()
    if system.startswith("optuna"):
        run_optuna(num, None if system == "optuna_memory" else str(Path.cwd() / "study.journal"))
    else:
        {"hydra_grid": run_hydra_grid, "study": run_study}[system](num)
    print(f"SECONDS {time.perf_counter() - began}")


def overhead(runs: int) -> list[dict[str, Any]]:
    """Milliseconds a trial of each system; the systems take turns, so that another load slows all alike."""
    slopes: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(runs):
        for system in SYSTEMS:
            scale = 20 if system.startswith("optuna") else 1  # a trial of Optuna's is too short to be seen among few
            few, many = (_seconds(system, scale * num) for num in (FEW, MANY))
            slopes[system].append(1000 * (many - few) / (scale * (MANY - FEW)))
    middle = {system: statistics.median(found) for system, found in slopes.items()}
    added = round(middle["study"] - middle["hydra_grid"], 1)
    return [
        {
            "case": "overhead",
            "system": system,
            "ms_a_trial": round(middle[system], 1),
            "runs": [round(slope, 1) for slope in slopes[system]],
            "added_to_hydra_ms": added if system == "study" else None,
            "target_ms": TARGET_MS if system == "study" else None,
        }
        | _facts()
        for system in SYSTEMS
    ]


def halving(words: list[str], seed: int) -> list[dict[str, Any]]:
    """The study lora_quant with every trial whole and with successive halving: same points as far as results allow."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        for pruner in PRUNERS:
            own = [f"hydra/sweeper/pruner={pruner}", f"hydra.sweep.dir={name}/{pruner}", f"hydra.sweeper.seed={seed}"]
            command = [sys.executable, "-m", "llama_lab", "-m", "search=lora_quant", "tracking=none", *own, *words]
            began = time.perf_counter()
            subprocess.run(command, cwd=name, env=_environment(), check=True, stdout=sys.stderr)
            found.append((pruner, time.perf_counter() - began, _trials(Path(name) / pruner / "trials.csv")))
    target = min(loss for _, _, trials in found[:1] for _, loss in trials if loss is not None)
    return [_study_row(*study, target=target, words=words, seed=seed) for study in found]


def _study_row(
    pruner: str, seconds: float, trials: list[tuple[int, float | None]], *, target: float, words: list[str], seed: int
) -> dict[str, Any]:
    steps, reached = 0, None
    for num_steps, loss in trials:
        steps += num_steps
        if reached is None and loss is not None and loss <= target:
            reached = steps
    losses = [loss for _, loss in trials if loss is not None]
    return {
        "case": "halving",
        "pruner": pruner,
        "words": words,
        "seed": seed,
        "trials": len(trials),
        "whole_trials": len(losses),
        "best_loss": round(min(losses), 5),
        "optimizer_steps": steps,
        "steps_to_best_of_none": reached,
        "seconds": round(seconds, 1),
    } | _facts()


def _trials(path: Path) -> list[tuple[int, float | None]]:
    """(optimizer steps, held-out loss of a whole trial) by number."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [(int(float(r["num_steps"])), float(r["eval_loss"]) if r["state"] == "done" else None) for r in rows]


def _seconds(system: str, num: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sweep", "system", system, str(num)]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{system} ended with {done.returncode}: {done.stderr}")
    return float(done.stdout.rpartition("SECONDS ")[2])


def main() -> None:
    """Measure, print one JSON line a row, and keep them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["overhead", "halving", "system"])
    parser.add_argument("words", nargs="*", help="of halving: settings of the study")
    parser.add_argument("--runs", type=int, default=3, help="of overhead (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of halving: the sampler's (default: 0)")
    parser.add_argument("--write", action="store_true", help="keep the rows in benchmarks/results/")
    args = parser.parse_intermixed_args()
    if args.case == "system":
        run_system(args.words[0], int(args.words[1]))
        return
    rows = overhead(args.runs) if args.case == "overhead" else halving(args.words, args.seed)
    for row in rows:
        print(json.dumps(row))
    if args.write:
        path = RESULTS / f"sweep_{args.case}.json"
        path.write_text(json.dumps({"schema": 1, "rows": rows}, indent=2) + "\n")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _facts() -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in ("hydra-core", "optuna")},
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
