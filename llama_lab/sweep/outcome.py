"""What became of a trial: read from its result.json and from how its process ended."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from llama_lab.errors import RunError
from llama_lab.rundir import RunDir

NUMBERS = (
    "eval_loss",
    "perplexity",
    "exact_match",
    "composes",
    "reward_accuracy",
    "reward_margin",
    "reward",
    "train_loss",
    "train_runtime_s",
    "tokens_per_s",
    "peak_memory_gib",
    "num_trainable_params",
    "num_steps",
)
"""What the study keeps of result.json beside the objectives."""
MEMORY = "memory"
"""Name of the constraint that a trial breaks which ran out of the GPU's memory."""
SETTINGS = "settings"
"""... whose settings cannot work together."""
UNKNOWN = 255
"""The exit code that multiprocessing gives a process whose fork server was killed: nobody knows how it ended."""


FULL = re.compile(r"out of memory|DefaultCPUAllocator: can't allocate|^MemoryError")
"""What PyTorch, bitsandbytes and Python say when memory is full."""


class State(StrEnum):
    """How a trial ended. `killed` is not told to the study as long as it may be started again."""

    done = "done"
    pruned = "pruned"
    infeasible = "infeasible"
    failed = "failed"
    killed = "killed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the study is told of a trial."""

    state: State
    values: tuple[float, ...] = ()
    """The objectives, where it is done or its numbers are known."""
    constraints: Mapping[str, float] = field(default_factory=dict)
    """By how much each limit is exceeded; a trial with one above 0 is infeasible."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def recorded(folder: Path) -> dict[str, Any] | None:
    """The result.json of a trial; None where there is none or it is not whole."""
    try:
        return RunDir(folder).read_result()
    except RunError:
        return None


def outcome_of(
    result: Mapping[str, Any] | None, objectives: Sequence[str], limits: Mapping[str, float], exit_code: int = 0
) -> Outcome:
    """What became of a trial.

    Args:
        result: its result.json.
        limits: the largest value that a number may have.
        exit_code: of its process; negative is the signal that killed it.
    """
    if exit_code < 0 or exit_code == 128 + signal.SIGTERM:
        return Outcome(state=State.killed, error=_killed_by(-exit_code if exit_code < 0 else signal.SIGTERM))
    if result is None and exit_code == UNKNOWN:
        return Outcome(state=State.killed, error="the process that its process was forked from was ended")
    if result is None:
        return Outcome(state=State.failed, error=f"the process ended with exit code {exit_code} and without a result")
    numbers = {k: float(v) for k in NUMBERS if isinstance(v := result.get(k), int | float)}
    status, error = result.get("status"), str(result.get("error") or "")
    if status == "pruned":
        return Outcome(state=State.pruned, numbers=numbers, error=error)
    if status == "infeasible" or (status == "failed" and FULL.search(error)):
        return Outcome(state=State.infeasible, constraints={MEMORY: missing_gib(error)}, numbers=numbers, error=error)
    if status != "ok":
        return Outcome(state=State.failed, numbers=numbers, error=error or f"exit code {exit_code}")
    return _ended_well(result, numbers, objectives, limits)


def _ended_well(
    result: Mapping[str, Any], numbers: dict[str, float], objectives: Sequence[str], limits: Mapping[str, float]
) -> Outcome:
    for name in (*objectives, *limits):
        value = result.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Outcome(state=State.failed, numbers=numbers, error=f"{name} is not a finite number: {value}")
    excess = {name: float(result[name]) - limit for name, limit in limits.items()}
    values = tuple(float(result[name]) for name in objectives)
    broken = [f"{name} {result[name]:.4g} > {limits[name]:g}" for name, by in excess.items() if by > 0]
    state = State.infeasible if broken else State.done
    return Outcome(state=state, values=values, constraints=excess, numbers=numbers, error=", ".join(broken))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, of a GPU or of the machine."""
    return isinstance(error, MemoryError) or FULL.search(str(error)) is not None


def missing_gib(message: str) -> float:
    """GiB that were missing when the GPU's memory was full, by PyTorch's message; 1 where it does not say."""
    units = {"GiB": 1.0, "MiB": 1 / 1024, "KiB": 1 / 1024**2}
    wanted = re.search(r"allocate ([\d.]+) (GiB|MiB|KiB)", message)
    free = re.search(r"of which ([\d.]+) (GiB|MiB|KiB) is free", message)
    if not wanted:
        return 1.0
    there = float(free[1]) * units[free[2]] if free else 0.0
    return max(float(wanted[1]) * units[wanted[2]] - there, 1e-3)


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    reason = " (the system was out of memory, or someone ended it)" if number == signal.SIGKILL else ""
    return f"its process was ended by {name}{reason}"
