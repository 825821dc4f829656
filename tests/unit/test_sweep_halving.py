"""Successive halving decides as Optuna's does, and knows trials that are measured at the same time."""

import math
import random

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner

from llama_lab.sweep.halving import Halving

STEPS = range(2, 33, 2)


def ended_at(pruner, curves, direction="minimize"):
    """For each curve, trained one after the other, the step at which it was ended; None for the whole."""
    study = optuna.create_study(pruner=pruner, direction=direction)
    found = []
    for curve in curves:
        trial, ended = study.ask(), None
        for step, value in zip(STEPS, curve, strict=True):
            trial.report(value, step)
            if trial.should_prune():
                ended = step
                break
        study.tell(trial, None if ended else curve[-1], optuna.trial.TrialState.PRUNED if ended else None)
        found.append(ended)
    return found


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    "options",
    [
        {"min_resource": 2},
        {"min_resource": 3, "reduction_factor": 3},  # rungs between two measurements
        {"min_resource": 2, "reduction_factor": 2, "min_early_stopping_rate": 1},
        {"min_resource": 2, "reduction_factor": 3, "bootstrap_count": 2},
    ],
)
def test_trials_one_after_the_other_are_judged_as_by_optuna(options, direction):
    draw = random.Random(str(options))
    curves = [[draw.random() for _ in STEPS] for _ in range(30)]
    curves[5][0] = math.nan
    wanted = ended_at(SuccessiveHalvingPruner(**options), curves, direction)
    assert {None, *wanted} > {None}
    assert ended_at(Halving(**options), curves, direction) == wanted


def test_trials_that_are_measured_together_are_judged_together():
    study = optuna.create_study(pruner=Halving(min_resource=4, reduction_factor=3))
    together = [study.ask() for _ in range(6)]
    for trial, loss in zip(together, (0.5, 0.1, 0.4, 0.2, 0.6, 0.3), strict=True):
        trial.report(loss, 4)
    assert [trial.should_prune() for trial in together] == [True, False, True, False, True, True]
    late = study.ask()
    late.report(0.15, 4)
    assert not late.should_prune()
    late.report(0.9, 8)  # no rung
    assert not late.should_prune()


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="reduction_factor"):
        Halving(min_resource=1, reduction_factor=1)
