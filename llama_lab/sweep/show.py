"""What a person sees of a study: a live table in a terminal, one line a trial elsewhere, and the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llama_lab.sweep.design import Design
from llama_lab.sweep.importance import ENOUGH, shares
from llama_lab.sweep.rows import Row, pareto_front, ranked, settings_line, short_names, shown
from llama_lab.sweep.settings import Direction

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

MAX_RANKED = 10
MAX_LIVE = 12
SETTINGS_WIDTH = 32
FILE_WIDTH = 160
"""Columns of the tables where the output is no terminal."""
STYLES = {"running": "cyan", "done": "green", "pruned": "yellow", "infeasible": "magenta", "failed": "red"}


def study_console() -> Console:
    """The terminal, or a wide page."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


@dataclass(kw_only=True)
class Board:
    """Shows a study while it runs. `update` is called again and again with all its trials."""

    console: Console
    design: Design
    n_trials: int
    told: set[int] = field(default_factory=set)
    """Trials whose end has been shown as a line."""
    live: Live | None = None
    began: float = 0.0
    ended_before: int = 0

    def start(self, rows: Sequence[Row]) -> None:
        """Say what is about to run."""
        self.began, self.ended_before = time.monotonic(), sum(row.is_over for row in rows)
        self.told = {row.number for row in rows if row.is_over}
        settings = self.design.settings
        self.note(
            f"Study {settings.study_name} in {self.design.folder}: {self.n_trials} trials"
            + (f", {self.ended_before} of them have ended" if self.ended_before else "")
            + f"; sampler {settings.sampler.name}, pruner {settings.pruner.name}"
        )
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def update(self, rows: Sequence[Row]) -> None:
        """Show the trials as they are now."""
        if self.live is not None:
            self.live.update(self._table(rows))
        for row in rows:
            if row.is_over and row.number not in self.told:
                self.told.add(row.number)
                if self.live is None:
                    self.note(self._line(row, rows))

    def stop(self) -> None:
        """Take the live table away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _names(self) -> dict[str, str]:
        return short_names([dimension.name for dimension in self.design.space.dimensions])

    def _line(self, row: Row, rows: Sequence[Row]) -> str:
        best = ranked(rows, self.design.directions)[:1]
        parts = [
            f"trial {row.number:>3} {row.state:<10}",
            f"{_result(row):<12}",
            settings_line(row.point, self._names()),
        ]
        if best and len(self.design.objectives) == 1:
            parts.append(f"(best {shown(best[0].values[0])}: trial {best[0].number})")
        if row.error and row.state != "pruned":
            parts.append(row.error.splitlines()[0])
        return "  ".join([*parts, self._left(rows)]).rstrip()

    def _left(self, rows: Sequence[Row]) -> str:
        """Time left, from how long the trials of this start took."""
        ended = sum(row.is_over for row in rows)
        left = self.n_trials - ended
        if left <= 0 or ended <= self.ended_before:
            return ""
        seconds = (time.monotonic() - self.began) / (ended - self.ended_before) * left
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def _table(self, rows: Sequence[Row]) -> Group:
        names, best = self._names(), ranked(rows, self.design.directions)[:1]
        table = Table(title=f"Study {self.design.settings.study_name}", title_justify="left")
        for column in ("trial", "state", "settings", "step", "loss", *self.design.objectives):
            table.add_column(column, justify="left" if column in ("state", "settings") else "right", overflow="fold")
        for row in [row for row in rows if row.state != "waiting"][-MAX_LIVE:]:
            values = [shown(value) for value in row.values] or [""] * len(self.design.objectives)
            table.add_row(
                f"{'* ' if row in best else ''}{row.number}",
                Text(row.state, style=STYLES.get(row.state, "")),
                Text(settings_line(row.point, names)),
                "" if row.step is None else str(row.step),
                "" if row.loss is None else shown(row.loss),
                *values,
            )
        told = [f"{sum(row.is_over for row in rows)} of {self.n_trials} trials have ended"]
        if best:
            told.append(f"best so far: trial {best[0].number} with {_result(best[0])}")
        return Group(table, Text(", ".join(filter(None, [*told, self._left(rows)]))))


def show_end(console: Console, design: Design, study: Study, rows: Sequence[Row]) -> None:
    """Print the ranked table, how much each setting mattered, and the states of all trials."""
    names = short_names([dimension.name for dimension in design.space.dimensions])
    best = ranked(rows, design.directions)
    if best:
        console.print(_ranked_table(design, names, best, pareto_front(rows, design.directions)))
        if len(best) > MAX_RANKED:
            console.print(f"... and {len(best) - MAX_RANKED} more in trials.csv", highlight=False)
        shares = importances(design, study, best)
        if shares:
            console.print("How much each setting mattered (PED-ANOVA, arXiv 2304.10255; shares of 1)", highlight=False)
            console.print(_importance_table(names, shares))
    counts = Counter(row.state for row in rows if row.is_over)
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    console.print(f"{sum(counts.values())} trials: {told}", highlight=False)


def _ranked_table(design: Design, names: Mapping[str, str], best: Sequence[Row], front: Sequence[Row]) -> Table:
    several = len(design.objectives) > 1
    title = "The Pareto front (*), then the others" if several else "The best trials"
    table = Table(title=title, title_justify="left")
    for column in ("", "trial", *design.objectives, "steps", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("settings", overflow="fold", min_width=SETTINGS_WIDTH)
    for rank, row in enumerate(best[:MAX_RANKED], start=1):
        table.add_row(
            ("*" if row in front else "") if several else str(rank),
            str(row.number),
            *map(shown, row.values),
            f"{row.numbers.get('num_steps', 0):.0f}",
            f"{row.numbers.get('train_runtime_s', row.seconds):.0f}",
            settings_line(row.point, names),
        )
    return table


def importances(design: Design, study: Study, best: Sequence[Row]) -> dict[str, dict[str, float]]:
    """How much of an objective each setting explains, by objective; empty where too few trials are done."""
    if len(best) < ENOUGH:
        return {}
    found = {}
    for number, (objective, direction) in enumerate(zip(design.objectives, design.directions, strict=True)):
        sign = -1.0 if direction is Direction.maximize else 1.0

        def cost_of(trial: FrozenTrial, number: int = number, sign: float = sign) -> float:
            return sign * float(trial.values[number])

        if explained := shares(study, len(best), cost_of):
            found[objective] = explained
    return found


def _importance_table(names: Mapping[str, str], importances: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table()
    table.add_column("setting")
    for objective in importances:
        table.add_column(objective, justify="right")
    totals = {name: sum(shares.get(name, 0.0) for shares in importances.values()) for name in names}
    for name in sorted(totals, key=lambda name: -totals[name]):
        table.add_row(names[name], *(f"{shares.get(name, 0.0):.2f}" for shares in importances.values()))
    return table


def _result(row: Row) -> str:
    if row.values:
        return " ".join(shown(value) for value in row.values)
    return "" if row.step is None or row.loss is None else f"{shown(row.loss)} @{row.step}"
