"""Draws docs/images/study_*.svg: the losses of a stacked study's points, and its time beside one by one.

python docs/pictures_study.py          # of benchmarks/results/study.json, the cases in docs/stacked.md
"""

import json
import math
from collections.abc import Callable
from typing import Any

from pictures_stacked import COLOURS, INK, PALE, box, text
from render_study import PICTURES, STACKED, STUDY, card_of, duration, one_by_one_of

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 480, 84, 340
"""Of the left panel, in which the losses are."""
BARS, BARS_END = 530, 830
WINNER, PRUNED = COLOURS[1], COLOURS[0]
Scale = Callable[[float], float]


def main() -> None:
    """Write the pictures."""
    rows = json.loads(STUDY.read_text())["rows"]
    for case, file in PICTURES.items():
        row = next(row for row in rows if (row["system"], row["case"]) == (STACKED, case))
        file.write_text(picture(row, one_by_one_of(row, rows)))


def picture(stacked: dict[str, Any], whole: dict[str, Any] | None) -> str:
    """Of one study, beside the same points one by one where these were measured."""
    body = [*losses_panel(stacked), *time_panel(stacked, whole)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>\n"])


def losses_panel(row: dict[str, Any]) -> list[str]:
    """A line a point, from its first held-out loss to where it ended."""
    curves = [trial["curve"] for trial in row["record"] if trial["curve"]]
    steps = sorted({step for curve in curves for step, _ in curve})
    losses = sorted(loss for curve in curves for _, loss in curve if math.isfinite(loss))
    x, y = _log(steps[0], steps[-1], LEFT, RIGHT), _log(losses[0], losses[-1], BOTTOM, TOP)
    states = " and ".join(f"{number} {state}" for state, number in row["trials"].items())
    drawn = [text(20, 30, "Held-out loss over steps", weight="bold"), text(20, 50, f"{row['case']}: {states}", PALE)]
    for loss in (losses[0], math.sqrt(losses[0] * losses[-1]), losses[-1]):
        drawn += [_line([(LEFT, y(loss)), (RIGHT, y(loss))], PALE, 0.4)]
        drawn += [
            text(LEFT - 8, y(loss) + 4, f"{loss:.3g}" if losses[-1] > 1.1 * losses[0] else f"{loss:.3f}", PALE, "end")
        ]
    for step in _ticks(row):
        drawn += [text(x(step), BOTTOM + 20, str(step), PALE, "middle")]
    drawn += [text(LEFT, BOTTOM + 42, "ring: pruned; dot: trained whole; orange: best", PALE)]
    drawn += [text(RIGHT, BOTTOM + 42, "steps", PALE, "end")]
    best = row["winner"]["number"] if row["winner"] else None
    for trial in sorted(row["record"], key=lambda trial: (trial["number"] == best, trial["num_steps"])):
        points = [(x(step), y(loss)) for step, loss in trial["curve"] if math.isfinite(loss)]
        colour = WINNER if trial["number"] == best else PRUNED
        drawn += [_line(points, colour, 2.5 if trial["number"] == best else 1.2), *_end(points, trial, colour)]
    return drawn


def time_panel(stacked: dict[str, Any], whole: dict[str, Any] | None) -> list[str]:
    """A bar a way; that of one by one has a piece a run, where each was run."""
    longest = whole["makespan_s"] if whole else 2 * stacked["makespan_s"]
    scale = (BARS_END - BARS) / longest
    drawn = [text(BARS, 30, "Time on one card", weight="bold"), text(BARS, 50, card_of(stacked), PALE)]
    drawn += [text(BARS, 110, "stacked, successive halving"), box(BARS, 120, scale * stacked["makespan_s"], 34, WINNER)]
    drawn += [text(BARS + scale * stacked["makespan_s"] + 8, 142, duration(stacked["makespan_s"]), INK)]
    if whole is None:
        return drawn
    num_runs = len(stacked["record"])
    is_each = len(whole["run_s"]) == num_runs
    drawn += [text(BARS, 200, f"one by one, {num_runs} whole runs" + ("" if is_each else ", by one of each base"))]
    at = float(BARS)
    for seconds in whole["run_s"] if is_each else [whole["makespan_s"]]:
        drawn.append(box(at, 210, max(1.0, scale * seconds - 1), 34, PRUNED))
        at += scale * seconds
    drawn += [text(BARS_END, 264, duration(whole["makespan_s"]), INK, "end")]
    times = whole["makespan_s"] / stacked["makespan_s"]
    return [*drawn, text(BARS, 310, f"{times:.2f} times as fast", weight="bold")]


def _ticks(row: dict[str, Any]) -> list[int]:
    """The steps at which trials ended."""
    return sorted({trial["num_steps"] for trial in row["record"] if trial["num_steps"]})


def _log(low: float, high: float, start: float, end: float) -> Scale:
    """From values to places, by their logarithms."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _line(points: list[tuple[float, float]], colour: str, width: float) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="0.8"/>'


def _end(points: list[tuple[float, float]], trial: dict[str, Any], colour: str) -> list[str]:
    """A ring where a point was pruned, a dot where it was trained whole."""
    if not points:
        return []
    x, y = points[-1]
    fill = colour if trial["state"] == "done" else "white"
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>']


if __name__ == "__main__":
    main()
