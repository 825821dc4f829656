"""The table of staged experiments that docs/render.py writes."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

STAGES = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "stages.json"
HEAD = (
    "| experiment | stage | seeds | right | gained, lost | compose | pairs told apart | steps | whole stage, s | GiB |"
)

Row = dict[str, Any]


def stages_table(file: Path = STAGES) -> str:
    """Each stage over its seeds, as shipped; nothing where it has not been measured."""
    if not file.exists():
        return ""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in json.loads(file.read_text())["rows"]:
        experiment, _, *where = row["case"].split(", ")
        if len(where) == 2:  # else settings were tried, and the case names them
            groups.setdefault((", ".join([f"`{experiment}`", *where]), row["system"]), []).append(row)
    if not groups:
        return ""
    lines = ["", HEAD, "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [_line(name, stage, rows) for (name, stage), rows in sorted(groups.items(), key=_order)]
    return "\n".join([*lines, "", _source([row for rows in groups.values() for row in rows]), ""])


def _order(group: tuple[tuple[str, str], list[Row]]) -> tuple[str, bool]:
    """By experiment, the stage that others go on from first."""
    return group[0][0], "exact_match_gained" in group[1][0]["fresh"]


def _line(name: str, stage: str, rows: list[Row]) -> str:
    cells = [
        *(name, stage, str(len(rows))),
        _over(rows, lambda row: row["fresh"]["exact_match"], "{:.0%}"),
        "; ".join(
            f"{row['fresh']['exact_match_gained']}, {row['fresh']['exact_match_lost']}"
            for row in sorted(rows, key=lambda row: row["case"])
            if "exact_match_gained" in row["fresh"]
        ),
        _over(rows, lambda row: row["fresh"]["composes"], "{:.0%}"),
        _over(rows, lambda row: row["fresh"].get("reward_accuracy"), "{:.0%}"),
        _over(rows, lambda row: row["num_steps"], "{:.0f}"),
        _over(rows, lambda row: row["stage_s"], "{:.0f}"),
        _over(rows, lambda row: row["peak_memory_gib"], "{:.1f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _over(rows: list[Row], value: Callable[[Row], float | None], form: str) -> str:
    """The mean over the seeds, and from where to where they go."""
    values = [found for row in rows if (found := value(row)) is not None]
    if not values:
        return ""
    mean, ends = form.format(fmean(values)), sorted({form.format(end) for end in (min(values), max(values))})
    return mean if len(ends) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _source(rows: list[Row]) -> str:
    requests = "|".join(sorted({str(row["fresh"]["num_rows"]) for row in rows}))
    kinds = sorted({(row["card"], json.dumps(row["versions"]), row["at_once"]) for row in rows})
    told = []
    for card, versions, at_once in kinds:
        named = ", ".join(f"{name} {version}" for name, version in json.loads(versions).items())
        at_a_time = "one command" if at_once == 1 else f"{at_once} commands"
        told.append(f"{card.removeprefix('none; ')}, {at_a_time} at a time; {named}")
    commands = ", ".join(f"`{command}`" for command in sorted({row["command"] for row in rows}))
    notes = "".join(f" In this call {note}." for note in sorted({row["note"] for row in rows if row.get("note")}))
    commits = ", ".join(sorted({row["commit"][:7] for row in rows if row["commit"]})) or "not recorded"
    return (
        f"Of {requests} requests that no run reads and that chose no setting: mean over seeds (smallest to largest); "
        "gained and lost are requests that are right after the stage and were not before it, and the other way round, "
        f"a pair a seed. {'. '.join(told)}.{notes} Commit {commits}: benchmarks/results/stages.json, by {commands}."
    )
