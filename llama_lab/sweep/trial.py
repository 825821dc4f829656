"""What Hydra's launcher runs, in whatever process and on whatever machine: one trial, in a fresh process of its own.

The job binds the trial to its number (job N is trial N), gives signs of life, passes the held-out losses on to the
study, and tells the outcome. It never raises: the study goes on with its other trials.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from llama_lab.config import RunConfig
from llama_lab.errors import LlamaLabError, RunError
from llama_lab.lock import check_unchanged
from llama_lab.rundir import RunDir
from llama_lab.sweep import child
from llama_lab.sweep.judge import Judge, tell
from llama_lab.sweep.outcome import SETTINGS, Outcome, State, outcome_of, recorded
from llama_lab.sweep.owner import PARENT, beating, take
from llama_lab.sweep.processes import STOP, run_alone
from llama_lab.sweep.settings import SweepSettings

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import Trial

    from llama_lab.stacked.hosts import Stacks

log = logging.getLogger(__name__)

LAUNCHING = threading.Lock()
"""Hydra's basic launcher sets globals of the process. Whoever launches through it holds this lock; a job lets it go
while its trial trains."""
DEATHS = "deaths"
"""User attribute: how often the trial's process was killed."""


@dataclass(kw_only=True)
class TrialTask:
    """The task that launchers get instead of llama_lab.app.job; it is pickled to where the job runs."""

    study_name: str
    storage: str
    settings: SweepSettings
    objectives: list[str]
    launched_by: str
    """The process that hands out the trials."""
    in_process: bool
    """The launcher runs the job in the process that hands out the trials (Hydra's basic one)."""
    offline: bool
    """No trial needs the hub."""
    num_threads: int | None = None
    work: Callable[[child.Order, Connection], None] = field(default=child.work)
    stacks: Stacks | None = None
    """Train the trials together where they share a base."""

    def __call__(self, cfg: DictConfig) -> float | None:
        """Do the trial whose number the job has; returns its first objective."""
        hydra_cfg = HydraConfig.get()
        number, folder = int(hydra_cfg.job.num), Path(hydra_cfg.runtime.output_dir)
        overrides, env = list(hydra_cfg.overrides.task), dict(hydra_cfg.job.env_set)
        trial, storage = self._trial(number)
        if not self._is_ours(trial, storage):
            log.info("Trial %d is done, or in other hands.", number)
            return None
        take(storage, trial._trial_id)
        with self._alone(), beating(storage, trial._trial_id, self.settings.heartbeat_s):
            outcome = self._outcome(cfg, trial, folder, overrides, env)
        if outcome is None:
            return None
        tell(trial, outcome)
        return outcome.values[0] if outcome.values else None

    def _trial(self, number: int) -> tuple[Trial, BaseStorage]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = _opened(self.storage)
        study = optuna.load_study(
            study_name=self.study_name,
            storage=storage,
            sampler=optuna.samplers.RandomSampler(),  # nothing is drawn here
            pruner=optuna.pruners.NopPruner(),
        )
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        return optuna.trial.Trial(study, trial_id), storage

    def _is_ours(self, trial: Trial, storage: BaseStorage) -> bool:
        from optuna.trial import TrialState

        frozen = storage.get_trial(trial._trial_id)
        return frozen.state is TrialState.RUNNING and frozen.system_attrs.get(PARENT) == self.launched_by

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let the launcher start other jobs while this one's trial trains."""
        if self.in_process:
            LAUNCHING.release()
        try:
            yield
        finally:
            if self.in_process:
                LAUNCHING.acquire()

    def _outcome(
        self, cfg: DictConfig, trial: Trial, folder: Path, overrides: list[str], env: Mapping[str, str]
    ) -> Outcome | None:
        """What became of the trial; None where the study was interrupted."""
        from llama_lab.compose import parse

        try:
            order = child.Order(
                config=parse(cfg),
                folder=folder,
                overrides=overrides,
                env=dict(env),
                num_threads=self.num_threads,
                pruner=self.settings.pruner,
            )
        except LlamaLabError as error:
            return _impossible(folder, str(error))
        try:
            check_own_run(RunDir(folder), order.config)
        except LlamaLabError as error:
            return Outcome(state=State.failed, error=str(error))
        ended = outcome_of(recorded(folder), self.objectives, self.settings.constraints)
        if ended.state is not State.failed:  # its process had ended, and was not heard
            return ended
        while True:
            (folder / "result.json").unlink(missing_ok=True)  # of a start that failed
            exit_code = self._run(order, trial)
            if STOP.is_set():
                return None
            outcome = outcome_of(recorded(folder), self.objectives, self.settings.constraints, exit_code)
            if outcome.state is not State.killed:
                return outcome
            deaths = int(trial.user_attrs.get(DEATHS, 0)) + 1
            trial.set_user_attr(DEATHS, deaths)
            if deaths > self.settings.retries:
                return replace(outcome, state=State.failed)
            log.warning("Trial %d: %s. It is started again.", trial.number, outcome.error)

    def _run(self, order: child.Order, trial: Trial) -> int:
        """The exit code of the trial's process; negative is the signal that killed it."""
        judge = Judge(trial, self.settings)
        if self.stacks is not None:
            return self.stacks.run(order, judge.hear)
        if self.offline:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported
        return run_alone(order, judge.hear, self.work)


@lru_cache
def _opened(address: str) -> BaseStorage:
    """A storage is opened once a process: a journal is read from its start each time."""
    from llama_lab.sweep.storage import open_storage

    return open_storage(address)


def check_own_run(run_dir: RunDir, config: RunConfig) -> None:
    """Refuse to take the result of another run, or to write over it.

    Raises:
        RunError: the folder holds a run of other settings.
    """
    if not run_dir.lock.exists():
        return
    try:
        check_unchanged(run_dir.read_lock(), config)
    except RunError as error:
        said = f"{run_dir.path} holds another run. Type hydra.sweep.dir=FOLDER with a new one."
        raise RunError(f"{said} {error}") from None


def _impossible(folder: Path, error: str) -> Outcome:
    """Settings that cannot work together: a hole in the space, which the sampler learns to avoid."""
    RunDir(folder).write_result(None, status="infeasible", error=error)
    return Outcome(state=State.infeasible, constraints={SETTINGS: 1.0}, error=error)
