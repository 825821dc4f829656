"""The trials of a study as tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_lab.sweep.dimension import Value
from llama_lab.sweep.judge import DETAILS
from llama_lab.sweep.settings import Direction
from llama_lab.sweep.trial import DEATHS

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


SHORT = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "checkpointing",
}
"""What people call settings with long names."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial."""

    number: int
    state: str
    """waiting, running, done, pruned, infeasible or failed."""
    point: Mapping[str, Value]
    values: tuple[float, ...]
    """Its objectives; empty where it has none."""
    step: int | None
    """The last step whose held-out loss is known."""
    loss: float | None
    """The held-out loss at that step."""
    numbers: Mapping[str, float]
    error: str
    deaths: int
    seconds: float

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "running")


def row_of(trial: FrozenTrial) -> Row:
    """A trial of the storage as a row."""
    details: dict[str, Any] = trial.user_attrs.get(DETAILS, {})
    other = {"COMPLETE": "done", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    step = trial.last_step
    return Row(
        number=trial.number,
        state=details.get("state", other) if trial.state.is_finished() else other,
        point=trial.params,
        values=tuple(details.get("values", (trial.values or ()) if other == "done" else ())),
        step=step,
        loss=None if step is None else trial.intermediate_values[step],
        numbers=details.get("numbers", {}),
        error=details.get("error", ""),
        deaths=int(trial.user_attrs.get(DEATHS, 0)),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
    )


def ranked(rows: Sequence[Row], directions: Sequence[Direction]) -> list[Row]:
    """The trials that are done, the best first; of several objectives those of the Pareto front first."""
    front = {row.number for row in pareto_front(rows, directions)}
    done = [row for row in rows if row.state == "done"]
    return sorted(done, key=lambda row: (row.number not in front, _costs(row, directions), row.number))


def pareto_front(rows: Sequence[Row], directions: Sequence[Direction]) -> list[Row]:
    """The trials that are done and than which no other is better in everything."""
    costs = {row.number: _costs(row, directions) for row in rows if row.state == "done"}
    dominated = {n for n, cost in costs.items() if any(_dominates(other, cost) for other in costs.values())}
    return [row for row in rows if row.number in costs.keys() - dominated]


def _costs(row: Row, directions: Sequence[Direction]) -> tuple[float, ...]:
    """The objectives as numbers of which less is better."""
    pairs = zip(row.values, directions, strict=True)
    return tuple(-value if direction is Direction.maximize else value for value, direction in pairs)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What a setting is called in a narrow table: its last word where no other has the same."""
    shortened = {name: _short(name) for name in names}
    taken = list(shortened.values())
    return {name: short if taken.count(short) == 1 else name for name, short in shortened.items()}


def settings_line(point: Mapping[str, Value], names: Mapping[str, str]) -> str:
    """The point of a trial in one line."""
    return " ".join(f"{names.get(name, name)}={shown(value)}" for name, value in point.items())


def shown(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    short = "/".join(part.split(".")[-1] for part in name.split("/"))
    return SHORT.get(short, short)
