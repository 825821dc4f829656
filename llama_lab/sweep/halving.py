"""Successive halving (arXiv 1810.05934) of trials that are measured together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from optuna.pruners import SuccessiveHalvingPruner
from optuna.study import StudyDirection

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


class Halving(SuccessiveHalvingPruner):
    """Optuna's pruner, but for whom a trial is compared with: all that have been measured at its rung.

    Optuna compares with those that were judged there before. Trials of a stack are measured at the same time, and the
    first of them would go on for want of others. Of trials that come one after the other both decide alike.
    """

    def __init__(
        self,
        min_resource: int,
        reduction_factor: int = 4,
        min_early_stopping_rate: int = 0,
        bootstrap_count: int = 0,
    ) -> None:
        """As of Optuna's, where the first rung is no guess.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__(min_resource, reduction_factor, min_early_stopping_rate, bootstrap_count)
        self.first = min_resource * reduction_factor**min_early_stopping_rate
        self.factor, self.least = reduction_factor, bootstrap_count

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to end, by its last measured value."""
        step = trial.last_step
        if step is None:
            return False
        value, sign = trial.intermediate_values[step], -1 if study.direction is StudyDirection.MAXIMIZE else 1
        before = max((other for other in trial.intermediate_values if other < step), default=0)
        for rung in self._rungs(before, step):
            measured = [_value_at(rung, other.intermediate_values) for other in study.get_trials(deepcopy=False)]
            competing = sorted(sign * found for found in measured if found is not None and not math.isnan(found))
            if math.isnan(value) or len(competing) <= self.least:
                return True
            if sign * value > competing[max(1, len(competing) // self.factor) - 1]:
                return True
        return False

    def _rungs(self, after: int, until: int) -> Iterator[int]:
        """The rungs behind one step and up to another."""
        rung = self.first
        while rung <= until:
            if rung > after:
                yield rung
            rung *= self.factor


def _value_at(rung: int, values: Mapping[int, float]) -> float | None:
    """The first value that a trial has from the rung on; None where it has not been there."""
    step = min((step for step in values if step >= rung), default=None)
    return None if step is None else values[step]
