"""The processes that runs of a sweep get: forked from one that has imported the libraries, and ended with the sweep."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import TYPE_CHECKING, Any

from llama_lab.sweep.child import Order

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

STOP = threading.Event()
"""Set when the sweep is interrupted: runs that end now are not told, they go on at the next start."""
CHILDREN: set[Any] = set()
"""The processes of this process's runs."""
TERMINATE_S = 20.0
"""A process that has not ended by then is killed; its runs go on from their last checkpoints in any case."""

Hear = Callable[[Connection, int], tuple[str, Any] | None]
"""Answers what a run says through its pipe, until its last word or until its process (a sentinel) has ended."""


def run_alone(order: Order, hear: Hear, work: Callable[[Order, Connection], None]) -> int:
    """Do one run in a process of its own; its exit code, where negative is the signal that killed it."""
    ours, theirs = fork_server().Pipe()
    process = started(work, (order, theirs), f"run-{order.folder.name}")
    theirs.close()
    try:
        hear(ours, process.sentinel)
        process.join()
    finally:
        CHILDREN.discard(process)
        ours.close()
    return int(process.exitcode or 0)


def started(work: Callable[..., None], args: tuple[Any, ...], name: str) -> ForkServerProcess:
    """A process that does `work`, known to `interrupt`. Take it out of CHILDREN when it has ended."""
    process = fork_server().Process(target=work, args=args, name=name)
    process.start()
    CHILDREN.add(process)
    if STOP.is_set():
        process.terminate()
    return process


def interrupt() -> None:
    """End the runs of this process; they go on at the next start."""
    STOP.set()
    for process in list(CHILDREN):
        process.terminate()
    stubborn = threading.Timer(TERMINATE_S, lambda: [process.kill() for process in list(CHILDREN)])
    stubborn.daemon = True
    stubborn.start()


def warm_up() -> None:
    """Let the process that others are forked from begin with its imports, while this one has other things to do."""
    fork_server()
    ensure_running()


def fork_server() -> ForkServerContext:
    """Forks each process from one that has imported the libraries and done nothing else."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        # joblib's workers have a start method of their own, which a forked process would look for in vain
        multiprocessing.set_start_method("forkserver", force=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_lab.sweep.warm"])
    return context
