"""The section of docs/stacked.md on a whole study, which docs/render.py writes."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "benchmarks" / "results" / "study.json"
PICTURES = {
    "512 tokens, 27 points of 729 steps": ROOT / "docs" / "images" / "study_stacked.svg",
    "embedded, 27 points of 243 steps": ROOT / "docs" / "images" / "study_embedded.svg",
}
"""By the case that each shows."""
STACKED, ONE_BY_ONE = "stacked, successive halving", "one by one, whole"
AIM = 6
"""Times as fast as one by one, at least."""
INTRO = """## A whole study

The command at the top with the random sampler and successive halving of factor 3, from its start to its exit, beside
the same points trained whole, in a process each, one after the other on one card, by the fast engine as well.
Importing, loading, compiling (with an empty cache, if not said otherwise) and measuring are in both. The space is the
shipped one without int8, which the fast engine leaves to TRL."""


def study_section() -> str:
    """Heading, table and picture; nothing where it has not been measured."""
    if not STUDY.exists():
        return ""
    rows = json.loads(STUDY.read_text())["rows"]
    lines = ["| | way | commit | trials | optimizer steps | time | best held-out loss |"]
    lines += ["|---|---|---|---|---:|---:|---:|"]
    lines += [_line(row, rows) for row in rows]
    found = [said for row in rows if row["system"] == STACKED and (said := _ranked(row, rows))]
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    source = f"On one {first['card']}; {versions}: benchmarks/results/study.json, by `{first['command']}`."
    shown = [
        f"![The losses of the points, and the time](images/{file.name})" for file in PICTURES.values() if file.exists()
    ]
    return "\n\n".join([INTRO, "\n".join(lines), *found, source, *shown, ""])


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    trials = ", ".join(f"{number} {state}" for state, number in row["trials"].items())
    best = f"{row['winner']['loss']:.4f}" if row["winner"] else "-"
    time = duration(row["makespan_s"])
    whole = partner(row, rows, ONE_BY_ONE)
    if row["system"] == STACKED and whole:
        time += f" ({whole['makespan_s'] / row['makespan_s']:.2f}x as fast)"
    way = row["system"] + ("" if row["card"] == rows[0]["card"] else f", on {cpu_of(row)}")
    cells = [row["case"], way, row["commit"], trials, f"{row['optimizer_steps']:,}", time, best]
    return f"| {' | '.join(cells)} |"


def _ranked(stacked: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Where the winner of the stacked study stands among the points trained whole."""
    whole = partner(stacked, rows, ONE_BY_ONE) or elsewhere(stacked, rows)
    if whole is None or not stacked["winner"]:
        return ""
    done = sorted((trial for trial in whole["record"] if trial["loss"] is not None), key=lambda trial: trial["loss"])
    rank = [trial["number"] for trial in done].index(stacked["winner"]["number"]) + 1
    losses = f"{done[rank - 1]['loss']:.4f} there, {done[0]['loss']:.4f} the best, {done[-1]['loss']:.4f} the worst"
    said = (
        f"{stacked['case']}: the stacked study's winner is number {rank} of {len(done)} among the points trained whole"
    )
    is_same = whole["card"] == stacked["card"]
    if stacked["case"].startswith("512") and is_same:
        ratio = whole["makespan_s"] / stacked["makespan_s"]
        is_reached = "reached" if ratio >= AIM and rank == 1 else "missed"
        said = f"Aimed at: {AIM} times as fast, and the same winner ({is_reached}: {ratio:.2f} times). {said}"
    how = f"One by one is {whole['measured']}" if is_same else f"Those were trained on {cpu_of(whole)}"
    return f"{said} ({losses}). {how}."


def partner(row: dict[str, Any], rows: list[dict[str, Any]], system: str) -> dict[str, Any] | None:
    """The row of the same case and card that another system has."""
    same = (other for other in rows if (other["case"], other["card"]) == (row["case"], row["card"]))
    return next((other for other in same if other["system"] == system), None)


def elsewhere(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The same points trained whole on another machine."""
    return next((other for other in rows if (other["case"], other["system"]) == (row["case"], ONE_BY_ONE)), None)


def cpu_of(row: dict[str, Any]) -> str:
    """The machine of a row without a GPU."""
    return f"a CPU with {row['cpus']} cores" if row["card"].startswith("none") else str(row["card"])


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
