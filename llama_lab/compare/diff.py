"""`diff A B`: what differs between two runs, and their curves over each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_lab.compare.find import find_runs
from llama_lab.compare.read import NUMBERS, Run, one_line
from llama_lab.compare.table import figure
from llama_lab.errors import RunError
from llama_lab.lock import below, flat
from llama_lab.results import number

CURVES = ("train/loss", "eval/loss")
FILE_WIDTH = 140
PLOT_WIDTH, PLOT_HEIGHT = 100, 18
MAX_DRAWN = 1e100
"""Numbers from there on have differences that are no floats, which plotext cannot draw."""
ABSENT = "(not recorded)"
Pair = tuple[str, Any, Any]


def diff(one: Path, other: Path) -> int:
    """Print the difference; the exit code.

    Raises:
        RunError: a folder holds no run, or several.
    """
    a, b = _single(one), _single(other)
    console = Console()
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    _heads(console, a, b)
    for title, pairs in sections(a, b):
        if pairs:
            console.print(_table(title, pairs))
        else:
            console.print(Text(f"{title}: no difference"))
    for name in CURVES:
        plot = curves(a, b, name)
        if plot:
            console.print(Text(plot))
    return 0


def sections(a: Run, b: Run) -> Iterator[tuple[str, list[Pair]]]:
    """What differs, by headings; an empty list where nothing does."""
    yield "Results", _results(a, b)
    yield "Settings", _differing(a.settings, b.settings)
    yield "Data", _part(a, b, "dataset")
    yield "Model", _part(a, b, "model")
    yield "Packages", _part(a, b, "versions")
    yield "Code", _differing(_code(a), _code(b))
    yield "Hardware", _part(a, b, "hardware")


def curves(a: Run, b: Run, name: str, width: int = PLOT_WIDTH, height: int = PLOT_HEIGHT) -> str:
    """The metric of both runs over the steps, as text; empty where no run has it."""
    import plotext

    drawn = {marker: known for marker, run in (("a", a), ("b", b)) if (known := points(run, name))[0]}
    if not drawn:
        return ""
    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.title(name)
    plotext.xlabel("step")
    for marker, (steps, values) in drawn.items():
        draw = plotext.plot if len(steps) > 1 else plotext.scatter
        draw(steps, values, label=f"run {marker.upper()}", marker=marker)
    return str(plotext.uncolorize(plotext.build()))


def points(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric."""
    rows = [(row["step"], number(row.get(name))) for row in run.metrics()]
    known = [(step, value) for step, value in rows if value is not None and max(abs(step), abs(value)) < MAX_DRAWN]
    return [step for step, _ in known], [value for _, value in known]


def _single(path: Path) -> Run:
    runs, _ = find_runs([path])
    inside = [run for run in runs if run.folder == path] or runs
    if len(inside) > 1:
        raise RunError(f"{path} holds {len(runs)} runs, and diff takes one. Type one of them, such as {runs[0].folder}")
    return inside[0]


def _heads(console: Console, a: Run, b: Run) -> None:
    for label, run in (("A", a), ("B", b)):
        told = ", ".join(filter(None, [run.status, run.note, run.title]))
        console.print(Text(f"{label}: {run.folder}  ({one_line(told)})"), soft_wrap=True)


def _results(a: Run, b: Run) -> list[Pair]:
    return [
        (key, _figure(key, a.numbers.get(key)), _figure(key, b.numbers.get(key)))
        for key in NUMBERS
        if a.numbers.get(key) != b.numbers.get(key)
    ]


def _figure(key: str, value: float | None) -> str:
    return "" if value is None else figure(key, value)


def _part(a: Run, b: Run, name: str) -> list[Pair]:
    return _differing(_object(a.lock, name), _object(b.lock, name))


def _object(lock: dict[str, Any], name: str) -> dict[str, Any]:
    found = lock.get(name)
    return flat(found) if isinstance(found, dict) else {}


def _code(run: Run) -> dict[str, Any]:
    """Commit, and of an uncommitted change its size and a short digest."""
    change = below(run.lock, "code", "diff")
    if not isinstance(change, str) or not change:
        return {"commit": below(run.lock, "code", "commit"), "uncommitted": "nothing" if change == "" else None}
    lines = sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in change.splitlines() if line)
    digest = hashlib.sha256(change.encode()).hexdigest()[:8]
    return {"commit": below(run.lock, "code", "commit"), "uncommitted": f"{lines} lines ({digest})"}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[Pair]:
    keys = sorted(one.keys() | other.keys())
    pairs = [(key, one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys]
    return [(key, left, right) for key, left, right in pairs if left != right]


def _table(title: str, pairs: list[Pair]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", "A", "B"):
        table.add_column(head, overflow="fold")
    for key, left, right in pairs:
        table.add_row(Text(one_line(key)), Text(one_line(str(left))), Text(one_line(str(right))))
    return table
