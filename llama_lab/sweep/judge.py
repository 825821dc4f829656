"""What the study is told of a trial: its held-out losses while it trains, and its outcome at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from llama_lab.sweep.outcome import Outcome, State
from llama_lab.sweep.settings import SweepSettings

if TYPE_CHECKING:
    from optuna.trial import Trial

DETAILS = "details"
"""User attribute: what the study keeps of a trial beside its values."""


class Judge:
    """Hears a trial's held-out losses, writes them into the study, and says whether the trial ends."""

    def __init__(self, trial: Trial, settings: SweepSettings) -> None:
        self.trial, self.settings = trial, settings
        self.one_objective = len(trial.study.directions) == 1

    def hear(self, pipe: Connection, sentinel: int) -> tuple[str, Any] | None:
        """Answer until the trial's process has ended; of one that it shares, the trial's last word."""
        return hear(pipe, sentinel, self._started, self._measured, self._is_pruned)

    def _started(self, first_step: int, num_steps: int) -> None:
        from llama_lab.sweep.samplers import make_pruner
        from llama_lab.sweep.study import STEPS

        study = self.trial.study
        steps = study.user_attrs.get(STEPS)
        if steps is None:
            steps = [first_step, num_steps]
            study.set_user_attr(STEPS, steps)
        study.pruner = make_pruner(self.settings.pruner, *steps)

    def _measured(self, step: int, loss: float) -> None:
        if self.one_objective:
            _report(self.trial, step, loss)

    def _is_pruned(self) -> bool:
        return self.one_objective and self.trial.should_prune()


def hear(
    pipe: Connection,
    sentinel: int,
    started: Callable[[int, int], None],
    measured: Callable[[int, float], None],
    is_pruned: Callable[[], bool] = lambda: False,
) -> tuple[str, Any] | None:
    """Answer what a run says until its process has ended; of a run that shares one, the last word.

    Args:
        sentinel: of the process.
        started: told of the first measured and of the last step.
        measured: told of a step and its held-out loss.
        is_pruned: asked once that step is over; whether the run is to end there.
    """
    while pipe in wait([pipe, sentinel]):
        try:
            kind, *told = pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        if kind == "started":
            started(*told)
        elif kind in ("measured", "judged"):
            if kind == "measured":
                measured(*told)
            ends = kind == "judged" and is_pruned(*told)
            with contextlib.suppress(BrokenPipeError):  # the process died; its exit code says how
                pipe.send(ends)
        else:
            return kind, told[0]
    return None


def tell(trial: Trial, outcome: Outcome) -> None:
    """Write the outcome into the study: numbers first, the state last, so that a finished trial has them all."""
    from optuna.trial import TrialState

    state = TrialState.FAIL
    if outcome.values:
        state = TrialState.COMPLETE  # also beyond a limit: the constraint says so, and samplers learn from both
    elif outcome.state in (State.pruned, State.infeasible):
        state = TrialState.PRUNED
    details: dict[str, Any] = {"state": str(outcome.state), "numbers": dict(outcome.numbers)}
    if outcome.values:
        details["values"] = list(outcome.values)
    trial.set_user_attr(DETAILS, details | ({"error": outcome.error} if outcome.error else {}))
    known = trial.constraints
    for name, excess in outcome.constraints.items():
        if name not in known:
            trial.set_constraint(name, excess)
    num_steps, loss = outcome.numbers.get("num_steps"), outcome.numbers.get("eval_loss")
    if state is TrialState.COMPLETE and len(outcome.values) == 1 and num_steps and loss is not None:
        _report(trial, int(num_steps), loss)
    trial.study.tell(trial, list(outcome.values) or None, state)


def _report(trial: Trial, step: int, loss: float) -> None:
    """Write a held-out loss into the study; a trial that went on from a checkpoint has written some before."""
    if step not in trial.storage.get_trial(trial._trial_id).intermediate_values:
        trial.report(loss, step)
