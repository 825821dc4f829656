"""The table of runs: for a terminal, as CSV, JSON or Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from llama_lab.compare.read import NUMBERS, one_line
from llama_lab.compare.rows import Row, companions, differing
from llama_lab.csv_text import csv_text

BASE = (
    "objective",
    "eval_loss",
    "perplexity",
    "tokens_per_s",
    "peak_memory_gib",
    "num_trainable_params",
    "train_runtime_s",
)
"""The numbers that a table shows unasked; what no row has is left out."""
TITLES = {
    "eval_loss": "eval loss",
    "tokens_per_s": "tokens/s",
    "peak_memory_gib": "peak GiB",
    "num_trainable_params": "trained",
    "train_runtime_s": "time",
    "train_loss": "train loss",
    "exact_match": "exact match",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "reward": "reward",
    "num_steps": "steps",
}
MAX_SETTING_COLUMNS = 5
"""More settings than that stand in one column of the terminal's table, a line a setting."""
MAX_LINED = 30
"""Rows up to which lines are drawn between them."""
SPREAD = ("objective", "eval_loss", "train_loss", "exact_match", "composes", "reward_accuracy")
"""Numbers that a table shows with their standard deviation; CSV and JSON have it of all."""
STYLES = {
    "running": "cyan",
    "interrupted": "yellow",
    "pruned": "yellow",
    "infeasible": "magenta",
    "failed": "red",
    "broken": "bold red",
}


@dataclass(kw_only=True)
class Columns:
    """What a table shows, by key."""

    facts: list[str]
    settings: list[str]


def columns_for(rows: Sequence[Row], key: str) -> Columns:
    """The numbers that some row has, and only the settings that differ."""
    numbers = [name for name in BASE if any(name in row.numbers for row in rows)]
    names = {row.first.objective_name for row in rows}
    if len(names) == 1 and names <= set(numbers):  # the objective has its column already
        numbers = [name for name in numbers if name != "objective"]
        numbers.sort(key=lambda name: name not in names)
    if key not in numbers and key != "objective" and key in NUMBERS:
        numbers.insert(0, key)
    settings = differing(rows)
    has_noise = any(row.n > 1 for row in rows)
    facts = ["run", "status", *(["n"] if has_noise else []), *numbers]
    if any(row.value("note") for row in rows):
        facts.append("note")
    return Columns(facts=facts, settings=settings)


def as_rich(rows: Sequence[Row], columns: Columns) -> Table:
    """For a terminal; every text is shown as it is, without markup."""
    follows = {key for keys in companions(rows, columns.settings).values() for key in keys}
    leading = [key for key in columns.settings if key not in follows]
    fold = len(leading) > MAX_SETTING_COLUMNS
    settings = [] if fold else leading
    short = short_names(leading)
    numbers = [key for key in columns.facts if key != "note"]
    notes = [key for key in columns.facts if key == "note"]
    table = Table(box=box.SIMPLE_HEAD, show_lines=fold and len(rows) < MAX_LINED, pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    for key in (*numbers, *settings, *(["settings that differ"] if fold else []), *notes):
        right = key in NUMBERS or key == "n"
        table.add_column(short.get(key) or title(key, rows), justify="right" if right else "left", overflow="fold")
    for row in rows:
        told = [shown(row, key) for key in (*numbers, *settings)]
        if fold:
            told.append("  ".join(f"{short[key]}={shown(row, key)}" for key in leading if key in row.first.settings))
        told += [shown(row, key) for key in notes]
        style = STYLES.get(row.first.status, "bold" if row.verdict in ("winner", "leads") else "")
        table.add_row(_mark(row), *(Text(cell, style=style) for cell in told))
    return table


def as_markdown(rows: Sequence[Row], columns: Columns) -> str:
    """A table of GitHub's Markdown."""
    keys = [*columns.facts, *columns.settings]
    lines = [["", *(title(key, rows) for key in keys)]]
    lines.append(["---:", *("---:" if key in NUMBERS else "---" for key in keys)])
    lines += [[_mark(row), *(_in_markdown(shown(row, key)) for key in keys)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row], columns: Columns) -> str:
    """Keys in the first line, numbers in full; sd and n of what was ranked stand beside the mean."""
    keys = [*columns.facts, *columns.settings]
    spread = [key for key in keys if any(key in row.numbers and row.numbers[key].n > 1 for row in rows)]
    table: list[list[Any]] = [["rank", "verdict", *keys, *(f"{key}_sd" for key in spread)]]
    for row in rows:
        cells = [_cell(row.value(key)) for key in keys]
        sds = [row.numbers[key].sd if key in row.numbers and row.numbers[key].n > 1 else "" for key in spread]
        table.append([row.rank or "", row.verdict, *cells, *sds])
    return csv_text(table)


def as_json(rows: Sequence[Row], columns: Columns, key: str, verdict: Sequence[str]) -> str:
    """All numbers of all rows with mean, sd, n and the values of the seeds; the folders of their runs."""
    found = [
        {
            "rank": row.rank,
            "verdict": row.verdict or None,
            "run": row.name,
            "status": row.first.status,
            "note": row.value("note") or None,
            "n": row.n,
            "folders": [str(run.folder) for run in row.runs],
            "numbers": {
                name: {"mean": stat.mean, "sd": stat.sd if stat.n > 1 else None, "n": stat.n, "values": stat.values}
                for name, stat in row.numbers.items()
            },
            "settings": {name: row.value(name) for name in columns.settings},
            "columns": {name: row.value(name) for name in columns.facts},
        }
        for row in rows
    ]
    return json.dumps(
        {"schema": 1, "ranked_by": key or None, "verdict": list(verdict), "rows": found}, indent=2, default=str
    )


def shown(row: Row, key: str) -> str:
    """A cell as a person reads it."""
    if key in ("run", "name"):
        return one_line(row.name if key == "run" else row.first.title)
    if key in row.numbers:
        stat = row.numbers[key]
        mean = figure(key, stat.mean)
        return f"{mean} ± {stat.sd:.2g}" if stat.n > 1 and key in SPREAD else mean
    value = row.value(key)
    is_missing = value is None and key not in row.first.settings
    if isinstance(value, float):
        return f"{value:.6g}"  # a drawn learning rate has 17 digits
    return "" if is_missing else one_line(_plain(value))


def figure(key: str, value: float) -> str:
    """A number with as many digits as its kind bears."""
    if key in ("num_trainable_params", "num_params", "num_steps", "tokens_per_s"):
        return f"{value:,.0f}"
    if key == "train_runtime_s":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    return f"{value:.2f}" if key == "peak_memory_gib" else f"{value:.4g}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """A setting's last word where no other column has the same: `r` says nothing, so short words keep their group."""
    last = [key.rpartition(".")[2] for key in keys]
    return {k: w if last.count(w) == 1 and len(w) > 4 else k for k, w in zip(keys, last, strict=True)}


def title(key: str, rows: Sequence[Row]) -> str:
    """The head of a column."""
    if key == "objective":
        names = sorted({row.first.objective_name for row in rows if row.is_ok})
        return f"objective ({one_line(', '.join(names))})"
    return TITLES.get(key, key)


def _mark(row: Row) -> str:
    """Rank and verdict in a few characters."""
    sign = f"{row.verdict} " if row.verdict in ("winner", "leads", "tied") else ""
    return f"{sign}{row.rank}" if row.rank else "-"


def _cell(value: Any) -> str:
    return "" if value is None else _plain(value)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_plain, value)) + "]"
    return str(value)


def _in_markdown(text: str) -> str:
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(sign, instead)
    return text
