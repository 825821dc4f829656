"""The table of docs/speed.md about what both engines learn."""

import itertools
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEARNING = ROOT / "benchmarks" / "results" / "learning.json"
EDGES = (0, 5, 10, 20, 40, 80)
"""Steps at which a new span begins; the last one goes on to the end."""
ENGINES = ("fast", "standard")


def learning_table(file: Path = LEARNING) -> str:
    """Both engines on the same rows: training losses of spans of steps, and how far engines and seeds are apart."""
    rows = sorted(json.loads(file.read_text())["rows"], key=lambda row: (ENGINES.index(row["system"]), row["case"]))
    means = [_means(row["losses"], _spans(rows)) for row in rows]
    has_spread = [row["system"] for row in rows] == ["fast", "fast", "standard", "standard"]
    head = [f"{row['system']}, {row['case']}" for row in rows] + _AGAINST * has_spread
    lines = [f"| mean training loss of steps | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for i, (start, end) in enumerate(_spans(rows)):
        numbers = [mean[i] for mean in means]
        cells = [*numbers, _apart(*numbers), abs(numbers[2] - numbers[3])] if has_spread else numbers
        lines.append(f"| {start + 1} to {end} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")
    said = [_within(means)] if has_spread else []
    said += [_after(rows), *(f"{row['system']}, {row['case']}: {row['note']}." for row in rows if "note" in row)]
    return "\n".join([*lines, "", " ".join(said), "", _source(rows)])


_AGAINST = ["engines apart (means)", "seeds of standard apart"]


def _spans(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(first, last but one) steps, counted from 0, that all runs have."""
    num_steps = min(len(row["losses"]) for row in rows)
    return list(itertools.pairwise([*(edge for edge in EDGES if edge < num_steps), num_steps]))


def _means(losses: list[float], spans: list[tuple[int, int]]) -> list[float]:
    return [sum(losses[start:end]) / (end - start) for start, end in spans]


def _apart(fast_0: float, fast_1: float, standard_0: float, standard_1: float) -> float:
    """Between the means of the seeds."""
    return abs(fast_0 + fast_1 - standard_0 - standard_1) / 2


def _within(means: list[list[float]]) -> str:
    """In how many spans the engines are no further apart than seeds are, and the stricter reading of that."""
    spans = list(zip(*means, strict=True))
    near = sum(_apart(*span) <= abs(span[2] - span[3]) for span in spans)
    between = sum(min(span[2:]) <= (span[0] + span[1]) / 2 <= max(span[2:]) for span in spans)
    return (
        f"In {near} of {len(spans)} spans the means of the engines are no further apart than the two seeds of "
        f"`standard`; in {between} the mean of `fast` lies between those two."
    )


def _after(rows: list[dict[str, Any]]) -> str:
    """What the trained models do on held-out rows."""
    parts = [
        f"{row['system']}, {row['case']}: {row['eval_loss']:.5f} and {row['exact_match']:.1%}"
        for row in rows
        if "eval_loss" in row
    ]
    return f"Held-out loss and exact match after training: {'; '.join(parts)}."


def _source(rows: list[dict[str, Any]]) -> str:
    places = sorted({f"{row['card']}, commit {row.get('commit', 'not recorded')}" for row in rows})
    source = f"The embedded default on {'; '.join(places)}"
    return f"{source}: benchmarks/results/learning.json, by `python -m benchmarks.learning`."
