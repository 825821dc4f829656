"""`--html`: one file with everything in it. Plotly's script and the data are packed with gzip, so nothing in a name or
a sample can be read as a tag; the page's own script unpacks them and writes all text as text."""

from __future__ import annotations

import base64
import gzip
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from llama_lab import __version__, pages
from llama_lab.compare import table
from llama_lab.compare.importance import ENOUGH, importances
from llama_lab.compare.read import NUMBERS, Run
from llama_lab.compare.rows import companions
from llama_lab.compare.samples import parse_samples

if TYPE_CHECKING:
    from llama_lab.compare.show import Comparison

MAX_CHANGE = 4000
"""Characters of an uncommitted change that the page keeps."""


def write_page(path: Path, found: Comparison) -> None:
    """Write the page.

    Raises:
        RunError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    template = Template(files("llama_lab.compare").joinpath("page.html").read_text(encoding="utf-8"))
    script = files("llama_lab.compare").joinpath("page.js").read_text(encoding="utf-8")
    text = template.substitute(
        title=html.escape(f"{len(found.runs)} runs compared"),
        version=html.escape(__version__),
        verdict="".join(f"<p>{html.escape(line)}</p>" for line in [*found.verdict, *found.notes]),
        plotly=_packed(get_plotlyjs()),
        data=_packed(json.dumps(page_data(found), separators=(",", ":"), default=str)),
        script=script,
    )
    pages.write_page(path, text)


def page_data(found: Comparison) -> dict[str, Any]:
    """What the page's script shows: figures, table, samples, locks."""
    ordered = [run for row in found.rows for run in row.runs]
    return {
        "figures": _figures(found),
        "table": _table(found),
        "samples": [{"run": run.name, "samples": told} for run in ordered if (told := parse_samples(run.samples()))],
        "locks": [{"run": run.name, "status": run.status, "lock": _lock(run)} for run in ordered],
    }


def _figures(found: Comparison) -> list[dict[str, Any]]:
    from llama_lab.compare import figures

    rows = found.rows
    follows = {name for names in companions(rows, found.columns.settings).values() for name in names}
    settings = [name for name in found.columns.settings if name not in follows]
    made: dict[str, Any] = {"curves": figures.learning_curves(rows, settings)}
    notes = {"curves": "Training and held-out loss over optimizer steps. The menu colours the curves by a setting."}
    if any(row.rank for row in rows):
        made["parallel"] = figures.parallel_coordinates(rows, settings, found.key)
        notes["parallel"] = "Each line is a row of the table. Draw along an axis to keep a range of it."
        made["scatter"] = figures.pareto_scatter(rows, settings, found.key)
        notes["scatter"] = "No run is better in both numbers than those on the dotted line."
    shares = importances(rows, found.key, found.columns.settings)
    notes["importance"] = (
        "How much each setting mattered for the best rows (PED-ANOVA, arXiv 2304.10255)."
        if shares
        else f"Nothing is said of fewer than {ENOUGH} rows that ended well, or where nothing differs."
    )
    made["importance"] = figures.importance_bars(shares) if shares else None
    return [
        {"id": name, "note": notes[name], "figure": figure and json.loads(figure.to_json())}
        for name, figure in made.items()
    ]


def _table(found: Comparison) -> dict[str, Any]:
    facts = [key for key in found.columns.facts if key != "note"]
    keys = ["rank", "verdict", *facts, *found.columns.settings, "name", "note"]
    rows = []
    for row in found.rows:
        special = {"rank": row.rank, "verdict": row.verdict}
        cells = []
        for key in keys:
            value = special[key] if key in special else row.value(key)
            text = ("" if value is None else str(value)) if key in special else table.shown(row, key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            cells.append([value if is_number else text.lower(), text])
        rows.append({"status": row.first.status, "cells": cells})
    heads = [{"key": key, "title": table.title(key, found.rows), "number": key in NUMBERS} for key in keys]
    return {"heads": heads, "rows": rows}


def _lock(run: Run) -> dict[str, Any]:
    """run.json with an uncommitted change cut to a size that a page can hold."""
    code = run.lock.get("code")
    change = code.get("diff") if isinstance(code, dict) else None
    if isinstance(code, dict) and isinstance(change, str) and len(change) > MAX_CHANGE:
        told = f"{change[:MAX_CHANGE]}\n... {len(change) - MAX_CHANGE} more characters in {run.folder / 'run.json'}"
        return run.lock | {"code": code | {"diff": told}}
    return run.lock


def _packed(text: str) -> str:
    # mtime=0: the same runs give the same file
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode("ascii")
