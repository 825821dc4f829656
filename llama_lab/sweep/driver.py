"""The slots of a study: each takes the next trial as soon as its own has ended, and launches it through Hydra."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from llama_lab.config import RunConfig
from llama_lab.hub import needs_hub
from llama_lab.process import signals_raise
from llama_lab.stacked.hosts import Stacks
from llama_lab.stacked.launcher import NAME as STACKED
from llama_lab.stacked.rows import check_rows
from llama_lab.sweep.design import Design
from llama_lab.sweep.judge import tell
from llama_lab.sweep.methods import LEARN_NOTHING
from llama_lab.sweep.outcome import Outcome, State
from llama_lab.sweep.owner import PARENT, beating, claim, me
from llama_lab.sweep.processes import STOP, interrupt
from llama_lab.sweep.rows import Row, row_of
from llama_lab.sweep.slots import gpu_of, threads_of, visible_gpus
from llama_lab.sweep.study import Claim, SweepStudy
from llama_lab.sweep.trial import DEATHS, LAUNCHING, TrialTask

POLL_S = 0.5
BASIC = "BasicLauncher"
ON_THIS_MACHINE = (BASIC, STACKED, "JoblibLauncher", "LocalLauncher")
"""Launchers that leave all GPUs to every job; a cluster gives each job its own."""
FEW = 5
"""max_failure_rate is a share of at least so many trials: the first failure alone says little."""


@dataclass(kw_only=True)
class Driver:
    """Hands the trials of a study to launchers, one slot each."""

    study: SweepStudy
    launchers: Sequence[Launcher]
    words_of: Callable[[Claim], list[str]]
    """All words of a trial's job."""
    in_process: bool
    gives_gpus: bool
    """The slots have GPUs to give."""
    stacks: Stacks | None = None
    """Where trials are trained together."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    full: threading.Event = field(default_factory=threading.Event)
    """No further trial is handed out."""
    ended: list[Row] = field(default_factory=list)
    """The trials that ended in this start."""

    def run(self, show: Callable[[], None]) -> None:
        """Run trials until all have ended, in whatever hands, or too many have failed.

        Args:
            show: called again and again meanwhile.
        """
        STOP.clear()
        with signals_raise(signal.SIGTERM), ThreadPoolExecutor(len(self.launchers)) as pool:
            slots = [pool.submit(self._slot, number, launcher) for number, launcher in enumerate(self.launchers)]
            try:
                while wait(slots, timeout=POLL_S, return_when=FIRST_EXCEPTION).not_done and not _broken(slots):
                    show()
            except BaseException:
                interrupt()
                raise
            if _broken(slots):
                interrupt()
            if self.stacks:
                self.stacks.close()
        for slot in slots:
            slot.result()
        show()

    def failed(self) -> list[Row]:
        """The trials of this start that failed."""
        return [row for row in self.ended if row.state == "failed"]

    def is_hopeless(self) -> bool:
        """Whether more trials of this start have failed than max_failure_rate allows."""
        return len(self.failed()) > self.study.settings.max_failure_rate * max(len(self.ended), FEW)

    def _slot(self, number: int, launcher: Launcher) -> None:
        while not (self.full.is_set() or STOP.is_set()):
            with self.lock:
                found = self.study.claim()
            if found is None:
                if self.study.is_over():
                    return
                STOP.wait(2 * POLL_S)  # what is left is in other hands; they may die
                continue
            self._finish(number, launcher, found)

    def _finish(self, slot: int, launcher: Launcher, found: Claim) -> None:
        """Launch a trial until it has ended, been given up, or been taken over."""
        try:
            while self._is_open(found):
                error = self._launch(slot, launcher, found)
                if self._is_open(found):
                    self._died(found, error)
        finally:
            self.study.release(found.number)
        row = row_of(self.study.storage.get_trial(found.trial_id))
        with self.lock:
            if row.is_over:
                self.ended.append(row)
            if self.is_hopeless():
                self.full.set()

    def _is_open(self, found: Claim) -> bool:
        trial = self.study.storage.get_trial(found.trial_id)
        return not STOP.is_set() and not trial.state.is_finished() and trial.system_attrs.get(PARENT) == me()

    def _launch(self, slot: int, launcher: Launcher, found: Claim) -> str:
        """One job; what went wrong with the job itself, if anything did."""
        words = self.words_of(found)
        if self.gives_gpus and (gpu := gpu_of(slot)) is not None:
            words.append(f"++hydra.job.env_set.CUDA_VISIBLE_DEVICES='{gpu}'")
        beat = beating(self.study.storage, found.trial_id, self.study.settings.heartbeat_s)
        try:
            with LAUNCHING if self.in_process else beat:
                job = launcher.launch([words], initial_job_idx=found.number)[0]
        except Exception as error:  # a lost node, a full disk: whatever the launcher says
            return f"{type(error).__name__}: {error}"
        if job.status is JobStatus.FAILED:
            return f"{type(job._return_value).__name__}: {job._return_value}"
        return "its job ended without a word"

    def _died(self, found: Claim, error: str) -> None:
        """The job of a trial ended and the trial did not: start it again, or give it up."""
        from optuna.trial import Trial

        trial = Trial(self.study.study, found.trial_id)
        deaths = int(trial.user_attrs.get(DEATHS, 0)) + 1
        trial.set_user_attr(DEATHS, deaths)
        if deaths > self.study.settings.retries:
            tell(trial, Outcome(state=State.failed, error=error[:500]))
        else:
            claim(self.study.storage, found.trial_id)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What Hydra's launchers are made from."""

    tree: DictConfig
    """The whole tree, hydra included, without the words that stand for several values."""
    context: HydraContext
    configs: Sequence[RunConfig]
    """Runs of the study, from which is read what all of them need."""


def make_driver(
    design: Design,
    study: SweepStudy,
    launch: Launch,
    words_of: Callable[[Claim], list[str]],
    note: Callable[[str], None],
) -> Driver:
    """A driver with one launcher a slot, each of which runs a trial instead of Hydra's task.

    Args:
        note: shows one line.
    """
    settings = design.settings
    kind = str(launch.tree.hydra.launcher._target_).rpartition(".")[2]
    offline = not any(needs_hub(run) for run in launch.configs)
    stacks = _stacks(design, study, launch, note, offline=offline) if kind == STACKED else None
    num_slots = _slots_of(stacks, study, note) if stacks else settings.n_jobs
    task = TrialTask(
        study_name=study.name,
        storage=design.storage,
        settings=study.settings,
        objectives=design.objectives,
        launched_by=me(),
        in_process=kind in (BASIC, STACKED),
        offline=offline,
        num_threads=threads_of(num_slots) if kind in ON_THIS_MACHINE and not stacks else None,
        stacks=stacks,
    )
    return Driver(
        study=study,
        launchers=_launchers(launch, task, num_slots),
        words_of=words_of,
        in_process=kind in (BASIC, STACKED),
        gives_gpus=kind in ON_THIS_MACHINE and "CUDA_VISIBLE_DEVICES" not in launch.tree.hydra.job.env_set,
        stacks=stacks,
    )


def _launchers(launch: Launch, task: TrialTask, num_slots: int) -> list[Launcher]:
    plugins = Plugins.instance()
    launchers = [
        plugins.instantiate_launcher(hydra_context=launch.context, task_function=task, config=launch.tree)
        for _ in range(num_slots)
    ]
    if hasattr(launchers[0], "ray_cfg"):
        from llama_lab.sweep.rays import start_ray

        start_ray(launchers[0].ray_cfg)
    return launchers


def _stacks(design: Design, study: SweepStudy, launch: Launch, note: Callable[[str], None], *, offline: bool) -> Stacks:
    num_jobs = study.settings.n_jobs
    return Stacks(
        wanted=check_rows(launch.tree.hydra.launcher.rows),
        configs=launch.configs,
        folder=design.folder,
        offline=offline,
        is_queue=False,
        most_points=min(study.n_trials, num_jobs) if num_jobs > 1 else study.n_trials,
        note=note,
    )


def _slots_of(stacks: Stacks, study: SweepStudy, note: Callable[[str], None]) -> int:
    """One slot for each row of each GPU, unless hydra.sweeper.n_jobs says more than one.

    A sampler that learns nothing from other trials may draw ahead: then there are so many for each kind of points, and
    each stack is full from its beginning.
    """
    settings = study.settings
    if settings.n_jobs > 1:
        return settings.n_jobs
    num_slots, said = stacks.decide() * max(1, len(visible_gpus())), "a trial for each row"
    if num_slots > 1 and settings.sampler.name in LEARN_NOTHING and stacks.num_kinds > 1:
        num_slots, said = num_slots * stacks.num_kinds, f"{said} of each kind of points"
    num_slots = min(num_slots, study.n_trials)
    if num_slots > 1:
        note(f"hydra.sweeper.n_jobs={num_slots}: {said}.")
    return num_slots


def _broken(slots: Sequence[Future[None]]) -> bool:
    return any(slot.done() and slot.exception() is not None for slot in slots)
