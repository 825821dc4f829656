"""The study in its storage: which trial comes next, which were abandoned, and what has been found.

A trial of the study is made as WAITING, so that every storage hands it to one process alone, and it stays RUNNING
until its outcome is told. A process that dies leaves it RUNNING; the next one becomes its owner and starts it again
under its number, in its folder, from its checkpoint. So numbers and folders do not depend on who died when.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_lab.errors import RunError
from llama_lab.sweep.dimension import Value
from llama_lab.sweep.owner import PARENT, claim, is_abandoned, me, want
from llama_lab.sweep.samplers import make_pruner, make_sampler
from llama_lab.sweep.settings import Direction, SweepSettings

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

IDENTITY = "llama_lab:identity"
"""User attribute of the study: settings and space, which a later start must share."""
STEPS = "llama_lab:steps"
"""User attribute of the study: [first measured step, last step] of a trial, from which the rungs follow."""
SETTLE_S = 0.3
"""After taking a trial over: when two processes did at once, the later one has it by then."""


class Points(Protocol):
    """What the trials of a study are: a search space, or a list of points."""

    def draw(self, trial: Trial) -> dict[str, Value]:
        """The point of a trial."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process may start."""

    number: int
    trial_id: int
    point: dict[str, Value]
    went_on: bool
    """It was begun by a process that is gone."""


@dataclass(kw_only=True)
class SweepStudy:
    """One study, seen from a process that hands out its trials. Not thread-safe: claim under a lock."""

    name: str
    storage: BaseStorage
    study: Study
    settings: SweepSettings
    points: Points
    n_trials: int
    given: Sequence[Mapping[str, Value]] = ()
    """The points of the first trials; what they leave out is drawn."""
    mine: set[int] = field(default_factory=set)
    """Numbers of the trials that this process works on."""

    def claim(self) -> Claim | None:
        """The next trial, abandoned ones first; None when all that is left is done or in other hands."""
        trial = self._abandoned() or self._waiting()
        if trial is None:
            return None
        frozen, went_on = trial
        self.mine.add(frozen.number)
        return Claim(number=frozen.number, trial_id=frozen._trial_id, point=self._draw(frozen), went_on=went_on)

    def release(self, number: int) -> None:
        """This process works on the trial no longer."""
        self.mine.discard(number)

    def trials(self) -> list[FrozenTrial]:
        """The trials of the study by number; those beyond n_trials that no process has begun are left out."""
        from optuna.trial import TrialState

        found = self.study.get_trials(deepcopy=False)
        return [t for t in found if t.number < self.n_trials or t.state is not TrialState.WAITING]

    def is_over(self) -> bool:
        """Whether all trials have ended, in whatever hands."""
        trials = self.trials()
        return len(trials) >= self.n_trials and all(trial.state.is_finished() for trial in trials)

    def check_same(self, identity: Mapping[str, Any], folder: str) -> None:
        """Refuse to go on with a study of other settings; the first start sets them.

        Raises:
            RunError: names what differs; or the study, or a run in the folder, is not of our making.
        """
        before = self.study.user_attrs.get(IDENTITY)
        if before is None:
            self._check_new(Path(folder))
            self.study.set_user_attr(IDENTITY, dict(identity))
            return
        differing = [
            f"{key}: {before.get(key, 'nothing')} then, {identity.get(key, 'nothing')} now"
            for key in sorted(before.keys() | identity.keys())
            if before.get(key) != identity.get(key)
        ]
        if differing:
            raise RunError(
                f"{folder} holds the study {self.name} of other settings ({'; '.join(differing[:5])}). Type "
                "hydra.sweeper.study_name=NAME for a study of its own (and hydra.sweep.dir=FOLDER, where you type it), "
                "or the settings of then to go on with this one."
            )

    def _check_new(self, folder: Path) -> None:
        """Refuse trials and runs of others; another process of this start may have been first in the meantime."""
        trials = self.study.get_trials(deepcopy=False)
        is_others = any(trial.state.is_finished() and PARENT not in trial.system_attrs for trial in trials)
        there = None if trials else next(iter(sorted(folder.glob("*/run.json"))), None)
        if (not is_others and there is None) or IDENTITY in self.study.user_attrs:
            return
        if is_others:
            raise RunError(
                f"The storage of {folder} has trials under the name {self.name} that llama_lab did not make. Type "
                "hydra.sweeper.study_name=NAME for a study of its own."
            )
        raise RunError(
            f"{folder} holds runs that are not of this study: {there.parent if there else ''}. Type "
            "hydra.sweeper.study_name=NAME or hydra.sweep.dir=FOLDER for a folder of its own."
        )

    def _abandoned(self) -> tuple[FrozenTrial, bool] | None:
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in self.mine or not is_abandoned(trial, self.settings.grace_s):
                continue
            if self._take_over(trial):
                return trial, True
        return None

    def _take_over(self, trial: FrozenTrial) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            claim(self.storage, trial._trial_id)
        except UpdateFinishedTrialError:
            return False
        time.sleep(SETTLE_S)
        return bool(self.storage.get_trial(trial._trial_id).system_attrs.get(PARENT) == me())

    def _waiting(self) -> tuple[FrozenTrial, bool] | None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState, create_trial

        if not self._all_waiting() and len(self.study.get_trials(deepcopy=False)) < self.n_trials:
            self.study.add_trial(create_trial(state=TrialState.WAITING))
        for trial in self._all_waiting():
            try:
                want(self.storage, trial._trial_id)
                if not self.storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    continue
                claim(self.storage, trial._trial_id)
            except UpdateFinishedTrialError:
                continue
            return trial, False
        return None

    def _all_waiting(self) -> Sequence[FrozenTrial]:
        from optuna.trial import TrialState

        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [trial for trial in waiting if trial.number < self.n_trials]

    def _draw(self, frozen: FrozenTrial) -> dict[str, Value]:
        from optuna.trial import Trial

        if frozen.number < len(self.given):
            self.storage.set_trial_system_attr(frozen._trial_id, "fixed_params", dict(self.given[frozen.number]))
        self.study.sampler = make_sampler(self.settings.sampler, self.settings.seed, frozen.number)
        steps = self.study.user_attrs.get(STEPS)
        if steps:  # Hyperband's samplers learn from trials of the same bracket
            self.study.pruner = make_pruner(self.settings.pruner, *steps)
        self.study._thread_local.cached_all_trials = None
        return self.points.draw(Trial(self.study, frozen._trial_id))


def open_study(
    name: str,
    storage: BaseStorage,
    settings: SweepSettings,
    points: Points,
    *,
    directions: Sequence[Direction],
    n_trials: int,
    given: Sequence[Mapping[str, Value]] = (),
) -> SweepStudy:
    """The study of that name, made where there is none yet.

    Raises:
        RunError: it has other objectives.
    """
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[StudyDirection[direction.upper()] for direction in directions],
        load_if_exists=True,
        pruner=optuna.pruners.NopPruner(),
        sampler=optuna.samplers.RandomSampler(),
    )
    if [direction.name.lower() for direction in study.directions] != [str(direction) for direction in directions]:
        raise RunError(
            f"The study {name} is to {' and '.join(d.name.lower() for d in study.directions)}, and now it is to "
            f"{' and '.join(directions)}. Type hydra.sweeper.study_name=NAME for a study of its own."
        )
    return SweepStudy(
        name=name, storage=storage, study=study, settings=settings, points=points, n_trials=n_trials, given=given
    )
