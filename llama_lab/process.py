"""What this process tells the libraries before they are imported: stay off the network, log into the run's file."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from llama_lab.config import RunConfig
from llama_lab.hub import is_reachable, needs_hub


def prepare(config: RunConfig) -> None:
    """Set the libraries' switches. Call it before torch, transformers or datasets are imported.

    No network is touched unless a hub id is named, and where the hub does not answer, its local cache is read. Warnings
    and log lines of the libraries go into the run's log file; with `verbose` they are shown as well.
    """
    if not needs_hub(config) or not is_reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if config.verbose or sys.stderr.isatty() else "1")
    logging.captureWarnings(True)
    if config.verbose:
        logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))


def quiet_libraries(config: RunConfig) -> None:
    """Send what the libraries print to the log file. Call it after they are imported."""
    import datasets
    import transformers

    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    if not config.verbose:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


_told: list[int] = []
"""Signals that are to end this process; what they raise does not always arrive."""


def terminated(signum: int, frame: object) -> NoReturn:
    """End the process by an exception, so that what it holds is let go; for signal.signal."""
    _told.append(signum)
    _end(signum)


def told_to_end() -> int | None:
    """The exit code that belongs to the signal that this process was to end by; None where none came."""
    return 128 + _told[-1] if _told else None


def end_if_told() -> None:
    """Raise again what a signal raised in a library that dropped it, as those in C and destructors do."""
    if _told:
        _end(_told[-1])


def _end(signum: int) -> NoReturn:
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def forget_signals() -> None:
    """What was to end by a signal has ended, and the process goes on."""
    _told.clear()


@contextmanager
def signals_raise(*signals: signal.Signals) -> Iterator[None]:
    """Let signals that would end this process raise SystemExit or KeyboardInterrupt, so that nothing is left behind."""
    before = {number: signal.getsignal(number) for number in signals}
    ends = (signal.SIG_DFL, signal.default_int_handler)  # not where nohup ignores SIGHUP
    caught = [number for number, handler in before.items() if handler in ends]
    for number in caught:
        signal.signal(number, terminated)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
