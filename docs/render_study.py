"""The section of docs/stacked.md on a whole study, which docs/render.py writes."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "benchmarks" / "results" / "study.json"
PICTURES = {
    "512 tokens, 27 points of 729 steps, words by frequency alone": ROOT / "docs" / "images" / "study_stacked.svg",
    "embedded, 27 points of 243 steps": ROOT / "docs" / "images" / "study_embedded.svg",
}
"""By the case that each shows."""
STACKED, ONE_BY_ONE = "stacked, successive halving", "one by one, whole"
COMPILED = ", kernels compiled"
"""What a case ends with that did not begin with an empty compile cache."""
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
    lines = ["| | way | card | commit | trials | optimizer steps | time | best held-out loss |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|"]
    lines += [_line(row, rows) for row in rows]
    found = [said for row in rows if row["system"] == STACKED and (said := _found(row, rows))]
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    source = f"On GPUs with {versions}: benchmarks/results/study.json, by `{first['command']}`."
    source = " ".join([source, *_notes(rows)])
    shown = [
        f"![The losses of the points, and the time](images/{file.name})" for file in PICTURES.values() if file.exists()
    ]
    aim = f"Aimed at: {AIM} times as fast, and the same winner."
    return "\n\n".join([INTRO, "\n".join(lines), aim, "\n".join(found), source, *shown, ""])


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What is to be known of rows, each once, with the card that it is about."""
    told: dict[str, str] = {row["note"]: card_of(row) for row in rows if "note" in row}
    return [f"On {card}: {note[0].lower()}{note[1:]}" for note, card in told.items()]


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    trials = ", ".join(f"{number} {state}" for state, number in row["trials"].items())
    best = f"{row['winner']['loss']:.4f}" if row["winner"] else "-"
    time, alone = duration(row["makespan_s"]) if row["makespan_s"] else "-", one_by_one_of(row, rows)
    if row["system"] == STACKED and alone:
        time += f" ({alone['makespan_s'] / row['makespan_s']:.2f}x as fast)"
    cells = [row["case"], row["system"], card_of(row), row["commit"], trials, f"{row['optimizer_steps']:,}", time, best]
    return f"| {' | '.join(cells)} |"


def _found(stacked: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How fast a stacked study was, and where its winner stands among the points trained whole."""
    alone, said = one_by_one_of(stacked, rows), []
    if alone:
        ratio = alone["makespan_s"] / stacked["makespan_s"]
        is_reached = "reached" if ratio >= AIM else "missed"
        said.append(f"{ratio:.2f} times as fast ({is_reached}; one by one is {alone['measured']})")
    if (whole := whole_of(stacked, rows)) and stacked["winner"]:
        said.append(_rank(stacked, whole))
    return f"- {stacked['case']}, on {card_of(stacked)}: {'; '.join(said)}." if said else ""


def _rank(stacked: dict[str, Any], whole: dict[str, Any]) -> str:
    """The place of a study's winner among the points trained whole."""
    done = sorted((trial for trial in whole["record"] if trial["loss"] is not None), key=lambda trial: trial["loss"])
    rank = [trial["number"] for trial in done].index(stacked["winner"]["number"]) + 1
    there, best, worst = (done[i]["loss"] for i in (rank - 1, 0, -1))
    where = "" if whole["card"] == stacked["card"] else f" on {card_of(whole)}"
    losses = f"{there:.4f} there, {best:.4f} the best, {worst:.4f} the worst"
    said = f"number {rank} of {len(done)} among the points trained whole{where} ({losses})"
    return f"its winner is the same (reached: {said})" if rank == 1 else f"its winner is another (missed: {said})"


def one_by_one_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The same points one by one on the same card, of the same commit where there are several; None without times."""
    if not row["makespan_s"]:
        return None
    found = [other for other in rows if other["system"].startswith(ONE_BY_ONE) and other["makespan_s"]]
    found = [other for other in found if (other["case"], other["card"]) == (row["case"], row["card"])]
    return next((other for other in found if other["commit"] == row["commit"]), found[0] if found else None)


def whole_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """All points of a case trained whole; on the same card, or on another where that has not been done."""
    found = [other for other in rows if other["system"] == ONE_BY_ONE and _case(other) == _case(row)]
    return next((other for other in found if other["card"] == row["card"]), found[0] if found else None)


def _case(row: dict[str, Any]) -> str:
    """What was trained, whatever was compiled before."""
    return str(row["case"]).removesuffix(COMPILED)


def card_of(row: dict[str, Any]) -> str:
    """The card of a row, or its machine where it has none."""
    return f"a CPU with {row['cpus']} cores" if row["card"].startswith("none") else str(row["card"])


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
