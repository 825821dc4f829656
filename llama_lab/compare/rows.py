"""Runs that differ only in their seed become one row with mean, standard deviation and n."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.compare.keys import getter
from llama_lab.compare.read import GROUP_KEYS, NUMBERS, Run, read_run
from llama_lab.lock import UNLOCKED
from llama_lab.sweep.settings import LARGER_IS_BETTER

OF_ANSWERS = ("exact_match", "composes")
"""Numbers that mean the same whichever trainer made the model: they are of its answers."""
OF_TRAINER = ("eval_loss", "perplexity", "train_loss", "reward_accuracy", "reward_margin", "reward")
"""Numbers by the trainer's own loss or reward."""
STARTS_WITH = "model.adapter"
CONFIRM = "confirm"
"""Folder of a study in which its best trials are trained again with other seeds."""


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A number over seeds."""

    values: tuple[float, ...]
    """One a seed."""

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Of the sample; NaN of one value."""
        return statistics.stdev(self.values) if self.n > 1 else math.nan


@dataclass(kw_only=True)
class Row:
    """One line of the table: runs that ended well under the same settings but for the seed, or one run that did not."""

    runs: list[Run]
    numbers: dict[str, Stat]
    rank: int | None = None
    """From 1; None where there is nothing to rank by."""
    verdict: str = ""
    """best, winner, leads, tied, worse, or untested: see `noise`."""

    @property
    def first(self) -> Run:
        """The run whose settings stand for all."""
        return self.runs[0]

    @property
    def is_ok(self) -> bool:
        """Whether it has ended well."""
        return self.first.status == "ok"

    @property
    def name(self) -> str:
        """Of the first run, and how many more there are."""
        return self.first.name if len(self.runs) == 1 else f"{self.first.name} (+{len(self.runs) - 1})"

    @property
    def n(self) -> int:
        """Seeds."""
        return len({_seed(run) for run in self.runs})

    def value(self, key: str) -> Any:
        """What stands in a column; of a number its mean."""
        if key in NUMBERS:
            return self.numbers[key].mean if key in self.numbers else None
        if key == "n":
            return self.n
        if key == "seed":
            seeds = {str(run.settings.get("seed", "")) for run in self.runs}
            return ",".join(sorted(seeds, key=lambda seed: (len(seed), seed)))
        return self._note() if key == "note" else getter(key)(self.first)

    def _note(self) -> str:
        commits = {str(getter("commit")(run)) for run in self.runs}
        mixed = f"its runs are of {len(commits)} commits" if len(commits) > 1 else ""
        return "; ".join(filter(None, [self.first.note, mixed]))


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """The runs as rows, unranked; those that did not end well stay single."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_same_but_for_seed(run) if _is_whole(run) else f"run {run.folder}", []).append(run)
    rows: dict[str, list[Run]] = {}
    for key, members in groups.items():
        is_one = len(members) == 1 and _is_whole(members[0])
        rows.setdefault(_as_begun(members[0]) if is_one else key, []).extend(members)
    return [Row(runs=members, numbers=_numbers(members)) for members in rows.values()]


def _is_whole(run: Run) -> bool:
    return run.status == "ok" and not run.note


def ranked(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows with the best mean of `key` first and their ranks set; behind them those that have no rank."""
    sign = -1.0 if larger_is_better(rows, key) else 1.0
    for row in rows:
        row.rank = None
    able = sorted((r for r in rows if r.is_ok and key in r.numbers), key=lambda r: sign * r.numbers[key].mean)
    for rank, row in enumerate(able, start=1):
        row.rank = rank
    order = ["ok", "running", "interrupted", "pruned", "infeasible", "failed", "broken"]
    rest = [row for row in rows if row.rank is None]
    return able + sorted(rest, key=lambda row: order.index(row.first.status))


def larger_is_better(rows: Sequence[Row], key: str) -> bool:
    """Which end of a number is the good one."""
    names = {row.first.objective_name for row in rows} if key == "objective" else {key}
    return bool(names) and names <= set(LARGER_IS_BETTER)


def trainers(rows: Sequence[Row]) -> list[str]:
    """Those of the rows that ended well, each once, in their order."""
    return list(dict.fromkeys(str(row.first.settings.get("trainer.name")) for row in rows if row.is_ok))


def rank_key(rows: Sequence[Row]) -> str:
    """What the rows are ranked by: their objective; the held-out loss where the objectives are several.

    Of several trainers neither losses nor rewards compare: it is then what answers are worth, by a number that all
    have; empty where there is none.
    """
    able = [row for row in rows if row.is_ok]
    names = {row.first.objective_name for row in able}
    key = "objective" if len(names) == 1 else "eval_loss"
    of_trainer = names <= set(OF_TRAINER) or len(names) > 1
    if len(trainers(rows)) > 1 and of_trainer:
        return next((name for name in OF_ANSWERS if all(name in row.numbers for row in able)), "")
    if able and not any(key in row.numbers for row in able):  # prompts alone have no loss
        return next((name for name in ("reward", *OF_ANSWERS) if all(name in row.numbers for row in able)), key)
    return key


def by_trainer(rows: Sequence[Row]) -> list[Row]:
    """The rows without ranks: trainer by trainer, each by its own held-out loss, then what did not end well."""
    known = trainers(rows)
    able = [row for row in ranked(rows, "eval_loss") if row.is_ok]
    able.sort(key=lambda row: known.index(str(row.first.settings.get("trainer.name"))))
    for row in rows:
        row.rank = None
    return able + [row for row in rows if not row.is_ok]


def differing(rows: Sequence[Row]) -> list[str]:
    """The settings in which the rows differ, those that do not change what is learned left out."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key in row.first.settings:  # one that an older version did not have yet differs in nothing known
            values.setdefault(key, set()).add(_text(row.value(key)))
    return sorted(key for key, kinds in values.items() if len(kinds) > 1 and not is_incidental(key))


def companions(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[str]]:
    """Settings that differ only because a group's choice does: model.file goes with model.name."""
    found: dict[str, list[str]] = {}
    for lead in (lead for lead in GROUP_KEYS.values() if lead in keys):
        group = lead.partition(".")[0] + "."
        for key in (key for key in keys if key.startswith(group) and key != lead):
            pairs = {(_text(row.value(lead)), _text(row.value(key))) for row in rows if row.first.settings}
            if len(pairs) == len({pair[0] for pair in pairs}):
                found.setdefault(lead, []).append(key)
    return found


def is_incidental(key: str) -> bool:
    """Whether a setting changes nothing of what is learned."""
    return key == "objective" or key in UNLOCKED or key.split(".")[0] in UNLOCKED


def _same_but_for_seed(run: Run) -> str:
    settings = {k: v for k, v in run.settings.items() if k != "seed" and not is_incidental(k)}
    return _text([run.objective_name, settings])


def _as_begun(run: Run, *later: Path) -> str:
    """As `_same_but_for_seed`, where an adapter of a run with the same seed stands for that run's own settings.

    So second stages are one row over seeds, although each began with another adapter.
    """
    key, start = _same_but_for_seed(run), run.settings.get(STARTS_WITH)
    if not start:
        return key
    # where the folder of both was moved, the one that it began with lies beside it
    for folder in (Path(str(start)), run.folder.parent / Path(str(start)).name):
        seen = (*later, run.folder.resolve())
        if not os.path.isfile(folder / "run.json") or folder.resolve() in seen:  # any text may stand there
            continue
        before = read_run(folder, folder.name)
        if _seed(before) == _seed(run):
            return key.replace(_text(start), _as_begun(before, *seen))
    return key


def _numbers(runs: Sequence[Run]) -> dict[str, Stat]:
    """One value a seed: the same seed again is no new draw, so its runs count as one, with their mean.

    The value that made a trial the best of its study is lucky; where it was trained again, that alone counts.
    """
    counted = [run for run in runs if run.folder.parent.name == CONFIRM] or runs
    found = {}
    for key in NUMBERS:
        by_seed: dict[str, list[float]] = {}
        for run in counted:
            if key in run.numbers:
                by_seed.setdefault(_seed(run), []).append(run.numbers[key])
        if by_seed:
            found[key] = Stat(values=tuple(map(statistics.fmean, by_seed.values())))
    return found


def _seed(run: Run) -> str:
    """The seed, or whatever stands in its place, as a text."""
    return _text(run.settings.get("seed"))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
