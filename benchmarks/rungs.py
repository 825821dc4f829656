"""Where bad trials should end: pruners tried on recorded held-out losses, without training anything.

    python -m benchmarks.rungs --write      # benchmarks/results/sweep_halving.json -> sweep_rungs.json

Two answers for each pruner. In random orders of the recorded trials: how many steps it takes, and how often it keeps
the best. In simulated studies, where the sampler learns: the best loss after half of the steps of a study without
pruning. Their trials follow a model of the recorded losses: linear in the settings at each step, and what that does not
explain is a trial's luck. Prints one JSON line a pruner.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from omegaconf import OmegaConf

from benchmarks.sweep import RESULTS, write_rows
from llama_lab.paths import CONF_DIR
from llama_lab.sweep.methods import PrunerName, PrunerSettings
from llama_lab.sweep.samplers import make_pruner
from llama_lab.sweep.space import Space, parse_space

Curve = list[tuple[int, float]]
"""(step, held-out loss); the last is that of the whole trial."""
Candidate = tuple[PrunerSettings, int]
"""A pruner, and the step of the first measurement on the way."""
SHARES = (8, 4)
"""That step is one of so many."""
RIDGE = 0.02
TRIALS = 16
"""Of a simulated study without pruning, as of the recorded one."""


def candidates(num_steps: int) -> list[Candidate]:
    """What is tried."""
    halving = [
        (PrunerSettings(name=PrunerName.successive_halving, reduction_factor=factor), num_steps // share)
        for share in SHARES
        for factor in (2, 3, 4)
    ]
    bands = PrunerSettings(name=PrunerName.hyperband, reduction_factor=3)
    others = [PrunerSettings(name=PrunerName.none), bands, PrunerSettings(name=PrunerName.median)]
    return [*halving, *((other, num_steps // SHARES[0]) for other in others)]


def pruned_at(trial: optuna.Trial, curve: Curve, every: int) -> int | None:
    """The step at which the study's pruner ends a trial; None for a whole one."""
    for step, loss in curve[:-1]:
        if step % every == 0:
            trial.report(loss, step)
            if trial.should_prune():
                return step
    return None


def replay(curves: list[Curve], settings: PrunerSettings, first_step: int) -> list[tuple[int, float | None]]:
    """(steps taken, loss of a whole trial) of each, one after the other, in the order given."""
    study = optuna.create_study(pruner=make_pruner(settings, first_step, curves[0][-1][0]))
    found: list[tuple[int, float | None]] = []
    for curve in curves:
        trial = study.ask()
        step = pruned_at(trial, curve, first_step)
        found.append(curve[-1] if step is None else (step, None))
        state = optuna.trial.TrialState.COMPLETE if step is None else optuna.trial.TrialState.PRUNED
        study.tell(trial, found[-1][1], state=state)
    return found


@dataclass(frozen=True)
class Surrogate:
    """The recorded losses as a function of the settings: logarithms of loss, linear at each step."""

    steps: list[int]
    weights: Mapping[int, np.ndarray]
    misfits: Mapping[int, float]
    """Standard deviation of what the settings do not explain."""

    def curve(self, point: Mapping[str, Any], luck: float) -> Curve:
        """The losses of a trial that is `luck` misfits worse than its settings say."""
        known = features(point)
        return [(s, math.exp(float(known @ self.weights[s]) + luck * self.misfits[s])) for s in self.steps]


def features(point: Mapping[str, Any]) -> np.ndarray:
    """What the model knows of a trial's settings."""
    rate = math.log(float(point["trainer.learning_rate"]) / 3e-4)
    alpha, rank = (math.log2(float(point[key]) / 16) for key in ("lora.alpha", "lora.r"))
    quants = [float(point["quant"] == name) for name in ("nf4", "fp4", "int8")]
    return np.array([1.0, rate, rate * rate, alpha, rate * alpha, rank, *quants])


def fit(records: list[dict[str, Any]], steps: list[int]) -> Surrogate:
    """Ridge regression at each step, over all trials that got there."""
    weights, misfits = {}, {}
    for step in steps:
        pairs = [(features(r["point"]), math.log(dict(map(tuple, r["curve"]))[step])) for r in records if _has(r, step)]
        x, y = np.array([known for known, _ in pairs]), np.array([loss for _, loss in pairs])
        penalty = RIDGE * np.diag([0.0, *[1.0] * (x.shape[1] - 1)])
        weights[step] = np.linalg.solve(x.T @ x + penalty, x.T @ y)
        misfits[step] = float(np.std(y - x @ weights[step]))
    return Surrogate(steps=steps, weights=weights, misfits=misfits)


def _has(record: dict[str, Any], step: int) -> bool:
    return any(logged == step for logged, _ in record["curve"])


def simulate(
    surrogate: Surrogate, space: Space, candidate: Candidate, seed: int, max_steps: int
) -> list[tuple[int, float | None]]:
    """(steps so far, loss of a whole trial) after each trial of a TPE study that ends once `max_steps` are taken."""
    settings, first_step = candidate
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(sampler=sampler, pruner=make_pruner(settings, first_step, surrogate.steps[-1]))
    luck, taken, found = np.random.default_rng(seed), 0, []
    while taken < max_steps:
        trial = study.ask()
        curve = surrogate.curve(space.draw(trial), float(luck.normal()))
        step = pruned_at(trial, curve, first_step)
        loss = curve[-1][1] if step is None else None
        study.tell(trial, loss, state=None if step is None else optuna.trial.TrialState.PRUNED)
        taken += step or curve[-1][0]
        found.append((taken, loss))
    return found


def best_within(trials: list[tuple[int, float | None]], steps: int) -> float:
    """The smallest loss of the whole trials within so many steps."""
    return min((loss for taken, loss in trials if loss is not None and taken <= steps), default=math.inf)


def measure(records: list[dict[str, Any]], candidate: Candidate, orders: int, studies: int) -> dict[str, Any]:
    """Both answers for one pruner."""
    settings, first_step = candidate
    whole = [[(s, x) for s, x in r["curve"]] for r in records if r["whole"]]
    num_steps, best = whole[0][-1][0], min(curve[-1][1] for curve in whole)
    draw, shares, kept = random.Random(0), [], []
    for _ in range(orders):
        found = replay(draw.sample(whole, len(whole)), settings, first_step)
        shares.append(sum(taken for taken, _ in found) / (num_steps * len(whole)))
        kept.append(min(loss for _, loss in found if loss is not None) == best)
    surrogate = fit(records, list(range(num_steps // SHARES[0], num_steps + 1, num_steps // SHARES[0])))
    shipped = OmegaConf.load(CONF_DIR / "search" / "lora_quant.yaml")
    space = parse_space(dict(shipped.hydra.sweeper.params), [])
    budget = TRIALS * num_steps
    unpruned = (PrunerSettings(name=PrunerName.none), num_steps)
    targets = [best_within(simulate(surrogate, space, unpruned, seed, budget), budget) for seed in range(studies)]
    half = [
        best_within(simulate(surrogate, space, candidate, studies + seed, budget // 2), budget // 2)
        for seed in range(studies)
    ]
    return {
        "case": "rungs",
        "pruner": str(settings.name),
        "options": settings.options(),
        "first_rung": f"1/{num_steps // first_step}" if settings.name is not PrunerName.none else "",
        "orders": orders,
        "share_of_steps": round(statistics.fmean(shares), 3),
        "best_is_kept": round(statistics.fmean(kept), 3),
        "studies": studies,
        "loss_at_half": round(statistics.median(half), 3),
        "loss_without_at_all": round(statistics.median(targets), 3),
        "as_good_at_half": round(statistics.fmean(h <= t for h, t in zip(half, targets, strict=True)), 3),
        "misfit": round(surrogate.misfits[num_steps], 3),
        "recorded": len(records),
    }


def main() -> None:
    """Try every candidate, print a JSON line each, and keep them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=100, help="random orders of the trials (default: 100)")
    parser.add_argument("--studies", type=int, default=100, help="simulated studies (default: 100)")
    parser.add_argument("--write", action="store_true", help="keep the rows in benchmarks/results/")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = json.loads((RESULTS / "sweep_halving.json").read_text())["rows"]
    recorded = [row for row in recorded if row["sampler"] == "tpe"]
    records = [record | {"whole": row["pruner"] == "none"} for row in recorded for record in row["record"]]
    num_steps = max(step for record in records for step, _ in record["curve"])
    rows = []
    for candidate in candidates(num_steps):
        rows.append(measure(records, candidate, args.orders, args.studies))
        print(json.dumps(rows[-1]), flush=True)
    if args.write:
        write_rows("rungs", rows)


if __name__ == "__main__":
    main()
