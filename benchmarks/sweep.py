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
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, environment, facts

RESULTS = ROOT / "benchmarks" / "results"
TARGET_MS = 150
"""Issue 4: what our study may add to a job of Hydra's."""
FEW, MANY = 4, 24
SYSTEMS = ("optuna_memory", "optuna_journal", "hydra_grid", "study")
PRUNERS = ("none", "successive_halving")
DEFAULTS = {
    # both studies then train the same points, and what differs is the pruner's alone
    "hydra/sweeper/sampler": "random",
    "hydra.sweeper.n_trials": "24",
    "trainer.eval_steps": "4",  # an eighth of a trial, as a pruner measures where it is not said
    "dataset.max_train_rows": "64",
    "dataset.max_eval_rows": "16",
    "trainer.save_steps": "0",
}
"""Of `halving`; words on the command line win."""
SEARCHED = ("lora.r", "lora.alpha", "lora.dropout", "trainer.learning_rate", "quant")


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
        | facts("hydra-core", "optuna")
        for system in SYSTEMS
    ]


def halving(words: list[str], seed: int, folder: Path) -> list[dict[str, Any]]:
    """The study lora_quant with every trial whole and with successive halving.

    Args:
        folder: where the studies lie; those that have ended there are only read.
    """
    found = []
    settings = DEFAULTS | dict(word.split("=", 1) for word in words)
    words = [f"{key}={value}" for key, value in settings.items()]
    for pruner in PRUNERS:
        place = folder / str(seed) / pruner
        own = [f"hydra/sweeper/pruner={pruner}", f"hydra.sweep.dir={place}", f"hydra.sweeper.seed={seed}"]
        command = [sys.executable, "-m", "llama_lab", "-m", "search=lora_quant", "tracking=none", *own, *words]
        subprocess.run(command, cwd=folder, env=environment(), check=True, stdout=sys.stderr)
        found.append((pruner, _trials(place)))
    target = min(trial.loss for trial in found[0][1] if trial.loss is not None)
    return [_study_row(*study, target=target, words=words, seed=seed) for study in found]


@dataclass(frozen=True)
class Trial:
    """What is on record of one trial."""

    num_steps: int
    loss: float | None
    """Held-out loss of a whole trial."""
    curve: list[tuple[int, float]]
    """(step, held-out loss)."""
    point: dict[str, str]


def _study_row(pruner: str, trials: list[Trial], *, target: float, words: list[str], seed: int) -> dict[str, Any]:
    steps, reached = 0, None
    for trial in trials:
        steps += trial.num_steps
        if reached is None and trial.loss is not None and trial.loss <= target:
            reached = steps
    losses = [trial.loss for trial in trials if trial.loss is not None]
    return (
        {
            "case": "halving",
            "sampler": dict(word.split("=", 1) for word in words)["hydra/sweeper/sampler"],
            "pruner": pruner,
            "words": words,
            "seed": seed,
            "trials": len(trials),
            "whole_trials": len(losses),
            "best_loss": round(min(losses), 5),
            "optimizer_steps": steps,
            "steps_to_best_of_none": reached,
        }
        | facts("hydra-core", "optuna")
        | {"record": [{"point": trial.point, "curve": trial.curve} for trial in trials]}
    )


def _trials(study: Path) -> list[Trial]:
    """The trials by number."""
    with (study / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        Trial(
            num_steps=int(float(row["num_steps"])),
            loss=float(row["eval_loss"]) if row["state"] == "done" else None,
            curve=_curve(study / row["trial"] / "metrics.jsonl"),
            point={key: row[key] for key in SEARCHED},
        )
        for row in rows
    ]


def _curve(path: Path) -> list[tuple[int, float]]:
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], round(row["eval/loss"], 5)) for row in logged if "eval/loss" in row]


def _seconds(system: str, num: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sweep", "system", system, str(num)]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{system} ended with {done.returncode}: {done.stderr}")
    return float(done.stdout.rpartition("SECONDS ")[2])


def main() -> None:
    """Measure, print one JSON line a row, and keep them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["overhead", "halving", "system"])
    parser.add_argument("words", nargs="*", help="of halving: settings of the study")
    parser.add_argument("--runs", type=int, default=3, help="of overhead (default: 3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of halving: the sampler's (default: 0)")
    parser.add_argument("--folder", type=Path, help="of halving: keep the studies there, and go on with them")
    parser.add_argument("--write", action="store_true", help="keep the rows in benchmarks/results/")
    args = parser.parse_intermixed_args()
    if args.case == "system":
        run_system(args.words[0], int(args.words[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if args.case == "overhead":
            rows = overhead(args.runs)
        else:
            rows = [row for seed in args.seeds for row in halving(args.words, seed, folder)]
    for row in rows:
        print(json.dumps(row))
    if args.write:
        write_rows(args.case, rows)


def write_rows(case: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows in benchmarks/results/, one a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    (RESULTS / f"sweep_{case}.json").write_text(f'{{"schema": 1, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
