"""The best trials trained again with other seeds: is the first better than the second, or was it lucky?

The value that made a trial the best is not counted again: the best of many draws is better than it will be next time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from optuna.trial import Trial
from rich.console import Console
from rich.table import Table

from llama_lab.sweep.design import Design
from llama_lab.sweep.dimension import Value
from llama_lab.sweep.driver import Launch, make_driver
from llama_lab.sweep.methods import PrunerName, PrunerSettings, SamplerName, SamplerSettings
from llama_lab.sweep.rows import Row, row_of, settings_line, short_names, shown
from llama_lab.sweep.settings import Direction
from llama_lab.sweep.study import Claim, SweepStudy, open_study
from llama_lab.sweep.welch import SIGNIFICANT, welch_p
from llama_lab.sweep.words import trial_words

FOLDER = "confirm"


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """One of the best trials with what it reached under other seeds."""

    row: Row
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation of the sample."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


class _Points:
    """Trials of the confirming study: which trial, and with which seed."""

    def draw(self, trial: Trial) -> dict[str, Value]:
        return {
            "trial": trial.suggest_int("trial", 0, 2**31),
            "seed": trial.suggest_int("seed", 0, 2**32 - 1),
        }


def confirm(
    design: Design, study: SweepStudy, best: Sequence[Row], launch: Launch, note: Callable[[str], None]
) -> list[Confirmed]:
    """Train the best trials again, each with the same seeds; those with numbers, the best mean first.

    It is a study of its own in the same storage, so it goes on where it stopped as well.

    Args:
        note: shows one line.
    """
    again = _open(design, study)
    numbers = [row.number for row in best[: design.settings.confirm]]
    _give(again, numbers, [int(launch.tree.seed) + 1 + n for n in range(design.settings.confirm_seeds)])
    told: set[int] = set()

    def show() -> None:
        for row in _ended(again):
            if row.number not in told:
                told.add(row.number)
                found = " ".join([row.state, *map(shown, row.values)])
                note(f"trial {row.point['trial']} with seed {row.point['seed']}: {found}")

    make_driver(design, again, launch, lambda found: _words(design, study, found, launch), note).run(show)
    confirmed = [Confirmed(row=row, values=_values(again, row.number)) for row in best if row.number in numbers]
    sign = -1.0 if design.directions[0] is Direction.maximize else 1.0
    return sorted((c for c in confirmed if c.values), key=lambda c: sign * c.mean)


def _open(design: Design, study: SweepStudy) -> SweepStudy:
    settings = replace(
        design.settings,
        sampler=SamplerSettings(name=SamplerName.random),
        pruner=PrunerSettings(name=PrunerName.none),
    )
    name = f"{study.name}.{FOLDER}"
    return open_study(name, study.storage, settings, _Points(), directions=design.directions, n_trials=0)


def _words(design: Design, study: SweepStudy, found: Claim, launch: Launch) -> list[str]:
    """The words of the trial that is confirmed, with another seed and folder."""
    row = row_of(study.trials()[int(str(found.point["trial"]))])
    claim = replace(found, point=dict(row.point))
    words = trial_words(design, claim, launch.tree, f"{FOLDER} {row.number}")
    own = [f"seed={found.point['seed']}", f"hydra.sweep.subdir={FOLDER}/{found.number}"]
    return [*(word for word in words if not word.startswith("seed=")), *own]


def _ended(again: SweepStudy) -> list[Row]:
    return [row for row in map(row_of, again.trials()) if row.is_over]


def _values(again: SweepStudy, number: int) -> tuple[float, ...]:
    """What a trial reached under other seeds."""
    return tuple(r.values[0] for r in _ended(again) if r.point.get("trial") == number and r.state == "done")


def _give(again: SweepStudy, numbers: Sequence[int], seeds: Sequence[int]) -> None:
    """A trial for each pair of a trial and a seed that an earlier start has not begun."""
    begun = [trial.params for trial in again.study.get_trials(deepcopy=False)]
    wanted = [{"trial": number, "seed": seed} for number in numbers for seed in seeds]
    missing = [pair for pair in wanted if pair not in begun]
    given = [point or (missing.pop(0) if missing else wanted[0]) for point in begun]
    again.given = [*given, *missing]
    again.n_trials = len(again.given)


def show_confirmed(console: Console, design: Design, confirmed: Sequence[Confirmed]) -> None:
    """Print means and deviations, and whether the first is distinguishable from the second."""
    names = short_names([dimension.name for dimension in design.space.dimensions])
    objective = design.objectives[0]
    table = Table(title=f"Trained again with {design.settings.confirm_seeds} other seeds", title_justify="left")
    for column in ("trial", f"{objective} then", "mean", "sd", "runs"):
        table.add_column(column, justify="right")
    table.add_column("settings", overflow="fold")
    for c in confirmed:
        found = (shown(c.row.values[0]), shown(c.mean), shown(c.sd), str(len(c.values)))
        table.add_row(str(c.row.number), *found, settings_line(c.row.point, names))
    console.print(table)
    if len(confirmed) > 1:
        console.print(verdict(confirmed[0], confirmed[1]), highlight=False, soft_wrap=True)


def verdict(first: Confirmed, second: Confirmed) -> str:
    """One sentence: is the first better than the second."""
    p = welch_p(first.values, second.values)
    if math.isnan(p):
        return "Too few of the runs ended well to tell the first from the second."
    told = f"Welch's t test of {len(first.values)} and {len(second.values)} runs: p = {p:.2g}"
    if p < SIGNIFICANT:
        return f"Trial {first.row.number} is better than trial {second.row.number} ({told})."
    return f"Trial {first.row.number} and trial {second.row.number} are within noise of each other ({told})."
