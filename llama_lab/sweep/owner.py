"""Who works on a trial: a process is named so that its death can be told, and gives signs of life into the storage.

Optuna has heartbeats for databases under `study.optimize` only; a study here may lie in a file, and is asked and told.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

PARENT = "llama_lab:parent"
"""System attribute of a trial: the process that launched it and will hear of its end."""
OWNER = "llama_lab:owner"
"""System attribute of a trial: the process that works on it: its job, or its parent until the job has begun."""
WANTS = "llama_lab:wants:"
"""System attribute of a trial, followed by a process: it is about to start the trial. Each process has its own, so that
two that want the same trial do not undo each other's."""
BEAT = "llama_lab:beat"
"""System attribute of a trial: when its process last gave a sign of life, seconds since 1970."""


def me() -> str:
    """This process: where it runs, its number, and its start, since numbers are used again."""
    return _named(os.getpid())


def is_alive(owner: str) -> bool | None:
    """Whether a process runs; None where it belongs to another machine and cannot be asked."""
    place, pid, start = owner.rsplit("|", 2)
    if place != _place():
        return None
    try:
        process = psutil.Process(int(pid))
        return _start(process) == start and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@lru_cache(maxsize=1)
def _named(pid: int) -> str:
    return f"{_place()}|{pid}|{_start(psutil.Process(pid))}"


def _place() -> str:
    """The machine and, in it, the container: process numbers mean something within one of them only."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start(process: psutil.Process) -> str:
    """When a process began: in ticks since the machine did, which no correction of the clock changes."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return f"{process.create_time():.0f}"


def claim(storage: BaseStorage, trial_id: int) -> None:
    """Make this process the one that launches a trial."""
    storage.set_trial_system_attr(trial_id, PARENT, me())
    take(storage, trial_id)


def take(storage: BaseStorage, trial_id: int) -> None:
    """Make this process the one that works on a trial."""
    storage.set_trial_system_attr(trial_id, OWNER, me())
    storage.set_trial_system_attr(trial_id, BEAT, time.time())


def want(storage: BaseStorage, trial_id: int) -> None:
    """Say that this process is about to start a waiting trial: a running one is then never without a name."""
    storage.set_trial_system_attr(trial_id, WANTS + me(), time.time())


def is_abandoned(trial: FrozenTrial, grace_s: float) -> bool:
    """Whether nobody works on a running trial any more. Trials of this process itself count as abandoned, too."""
    owner = trial.system_attrs.get(OWNER)
    owners = [owner] if owner else [k.removeprefix(WANTS) for k in trial.system_attrs if k.startswith(WANTS)]
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    silent = time.time() - float(trial.system_attrs.get(BEAT, began)) > grace_s
    others = [is_alive(owner) for owner in owners if owner != me()]
    if None in others or not owners:  # of another machine, or not of ours at all
        return silent
    return not any(others)


@contextmanager
def beating(storage: BaseStorage, trial_id: int, every_s: float) -> Iterator[None]:
    """Give signs of life for a trial while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(storage, trial_id, every_s, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(storage: BaseStorage, trial_id: int, every_s: float, stop: threading.Event) -> None:
    from optuna.exceptions import UpdateFinishedTrialError

    while not stop.wait(every_s):
        try:
            storage.set_trial_system_attr(trial_id, BEAT, time.time())
        except UpdateFinishedTrialError:
            return
        except Exception as error:  # a database that is away for a moment: the next beat tries again
            log.warning("No sign of life could be written: %s", error)
