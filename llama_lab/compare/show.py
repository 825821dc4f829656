"""`compare`: from folders to a table, a page, or a table that follows a running sweep."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from llama_lab.compare import table
from llama_lab.compare.find import find_runs
from llama_lab.compare.keys import getter, resolve
from llama_lab.compare.noise import judge
from llama_lab.compare.read import NUMBERS, Run
from llama_lab.compare.rows import (
    OF_ANSWERS,
    OF_TRAINER,
    Row,
    by_trainer,
    companions,
    larger_is_better,
    rank_key,
    ranked,
    rows_of,
    trainers,
)
from llama_lab.compare.where import parse_where
from llama_lab.errors import ConfigError
from llama_lab.pages import check_page

FILE_WIDTH = 220
"""Columns of the table where the output is no terminal."""
LIVE_EVERY_S = 2.0
QUIET_S = 10.0
"""A sweep is over when none of its runs has been running for so long: between two trials there is a pause."""


@dataclass(kw_only=True)
class Options:
    """The words after `compare`."""

    paths: list[Path]
    sort: str | None = None
    reverse: bool = False
    columns: list[str] = field(default_factory=list)
    where: str | None = None
    format: str = "table"
    html: Path | None = None
    wandb_report: bool = False
    live: bool = False


@dataclass(kw_only=True)
class Comparison:
    """What is compared, ranked and judged."""

    runs: list[Run]
    rows: list[Row]
    columns: table.Columns
    key: str
    """What the rows are ranked by; empty where no number of theirs compares."""
    key_name: str
    """The same, with the objective by its name."""
    verdict: list[str]
    notes: list[str]


def compare(options: Options) -> int:
    """Show the comparison as the options say; the exit code.

    Raises:
        LlamaLabError: a path, key or expression that cannot be right.
    """
    if options.live:
        return _follow(options)
    if options.html:
        check_page(options.html)
    found = comparison(options)
    if options.html:
        from llama_lab.compare.page import write_page

        write_page(options.html, found)
        print(f"{options.html} shows {len(found.runs)} runs. Open it in a browser; it needs no network.")
    if options.wandb_report:
        from llama_lab.compare.wandb_report import write_report

        print(f"A report of {len(found.runs)} runs on W&B: {write_report(found)}")
        print("Runs that were offline are in it once they are uploaded; each has said how.")
    if options.html or options.wandb_report:
        return 0
    if options.format == "table":
        console = _console()
        console.print(_view(found))
    else:
        print(_as_text(found, options.format), end="")
        for line in found.notes:
            print(f"llama_lab: {line}", file=sys.stderr)
    return 0


def comparison(options: Options) -> Comparison:
    """Find, filter, group, rank and judge the runs.

    Raises:
        LlamaLabError: see `compare`.
    """
    runs, unread = find_runs(options.paths)
    notes = [f"cannot be read: {line}" for line in unread]
    fitting = _filtered(runs, options.where)
    if len(fitting) < len(runs):
        notes.append(f"{len(fitting)} of {len(runs)} runs fit --where")
    rows = rows_of(fitting)
    sort = resolve(options.sort, runs, "--sort") if options.sort else None
    key = sort if sort in NUMBERS else rank_key(rows)
    rows = ranked(rows, key) if key else by_trainer(rows)
    names = {row.first.objective_name for row in rows if row.is_ok}
    key_name = names.pop() if key == "objective" and len(names) == 1 else key
    verdict = judge(rows, key, key_name) if key else [_not_ranked(rows)]
    if key and (several := _about_trainers(rows, key, is_asked_for=sort == key)):
        notes.append(several)
    elif len(names) > 1 and not sort:
        notes.append("the runs have different objectives, so eval_loss ranks them; --sort KEY ranks by another number")
    if sort and sort not in NUMBERS:
        rows.sort(key=lambda row: _order(row.value(sort)))
    if options.reverse:
        rows.reverse()
    columns = table.columns_for(rows, key)
    if options.columns:
        wanted = [word if word == "n" else resolve(word, runs, "--columns") for word in options.columns]
        columns = table.Columns(facts=wanted, settings=[])
    return Comparison(
        runs=fitting, rows=rows, columns=columns, key=key, key_name=key_name, verdict=verdict, notes=notes
    )


def _not_ranked(rows: list[Row]) -> str:
    known = sorted(trainers(rows))
    return (
        f"Not ranked: losses and rewards of trainers {', '.join(known)} do not compare, and no other number is in all "
        f"runs. Type --where trainer={known[0]}, or --sort KEY."
    )


def _about_trainers(rows: list[Row], key: str, *, is_asked_for: bool) -> str:
    """Why another number than the objective ranks runs of several trainers, or what is wrong with the one asked for."""
    known = sorted(trainers(rows))
    if len(known) < 2 or (is_asked_for and key not in OF_TRAINER):
        return ""
    if key in OF_TRAINER:
        return f"{key} of trainers {', '.join(known)} does not compare: each has its own loss and reward"
    is_instead = key in OF_ANSWERS
    return f"the losses of trainers {', '.join(known)} do not compare, so {key} ranks the runs" if is_instead else ""


def _filtered(runs: list[Run], where: str | None) -> list[Run]:
    if where is None:
        return runs
    test = parse_where(where, lambda word: getter(resolve(word, runs, "--where")))
    fitting = [run for run in runs if test(run)]
    if not fitting:
        raise ConfigError(f"--where {where}: none of the {len(runs)} runs fits.")
    return fitting


def _order(value: object) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _as_text(found: Comparison, form: str) -> str:
    if form == "csv":
        return table.as_csv(found.rows, found.columns)
    if form == "json":
        return table.as_json(found.rows, found.columns, found.key, found.verdict) + "\n"
    told = "".join(f"\n{line}\n" for line in found.verdict)
    return table.as_markdown(found.rows, found.columns) + told


def _view(found: Comparison) -> Group:
    counts = Counter(run.status for run in found.runs)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    end = "largest" if larger_is_better(found.rows, found.key) else "smallest"
    order = f" Ranked by {found.key_name}, {end} first." if found.key else ""
    head = f"{len(found.runs)} runs: {told}.{order}"
    along = companions(found.rows, found.columns.settings).items()
    told_along = [f"With {lead} differ: {', '.join(keys)}." for lead, keys in along]
    lines = [head, *found.verdict, *told_along, *(f"Note: {note}." for note in found.notes)]
    return Group(table.as_rich(found.rows, found.columns), *map(Text, lines))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _follow(options: Options) -> int:
    """Keep the table current until no run has been running for a while."""
    from rich.live import Live

    console = _console()
    found = comparison(options)
    active = time.monotonic()
    try:
        with Live(_view(found), console=console, auto_refresh=False) as live:
            while time.monotonic() - active < QUIET_S:
                time.sleep(LIVE_EVERY_S)
                found = comparison(options)
                live.update(_view(found), refresh=True)
                if any(run.status == "running" for run in found.runs):
                    active = time.monotonic()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The runs go on; only their table has ended.") from None
    return 0
