"""The figures of the page, made with Plotly: curves, parallel coordinates, scatter with Pareto front, importance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale
from plotly.subplots import make_subplots

from llama_lab.compare.diff import CURVES, points
from llama_lab.compare.read import Run, one_line
from llama_lab.compare.rows import Row, larger_is_better
from llama_lab.compare.table import shown, title
from llama_lab.results import number

MAX_POINTS = 60_000
"""Of all curves together; longer ones are thinned out, so that the page stays small."""
MAX_DIMENSIONS = 12
COSTS = ("peak_memory_gib", "train_runtime_s", "tokens_per_s", "num_trainable_params")
"""What the objective is plotted against."""
LAYOUT: dict[str, Any] = {"template": "plotly_white", "margin": {"l": 60, "r": 30, "t": 60, "b": 50}, "height": 480}


def escaped(text: object) -> str:
    """Text that Plotly shows as it is: it would read tags, and %{} in what is shown under the mouse."""
    told = one_line(str(text))
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("%", "&#37;")):
        told = told.replace(sign, instead)
    return told


def learning_curves(rows: Sequence[Row], settings: Sequence[str]) -> go.Figure:
    """Training and held-out loss over the steps; the legend goes by run or by the values of a setting."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=CURVES)
    runs = [(row, run) for row in rows for run in row.runs]
    drawn: list[tuple[Row, Run, int]] = []
    share = max(20, MAX_POINTS // max(1, 2 * len(runs)))
    for row, run in runs:
        for column, name in enumerate(CURVES, start=1):
            steps, values = _thinned(*points(run, name), share)
            if steps:
                about = "<br>".join([escaped(run.name), *_settings(row, settings)])
                hover = f"{about}<br>step %{{x}}: %{{y:.4g}}<extra></extra>"
                mode = "lines+markers" if len(steps) < 30 else "lines"
                figure.add_trace(go.Scatter(x=steps, y=values, mode=mode, hovertemplate=hover), row=1, col=column)
                drawn.append((row, run, column))
    styles = {"run": _style([run.name for _, run, _ in drawn], drawn)}
    styles |= {key: _style([shown(row, key) for row, _, _ in drawn], drawn) for key in settings}
    for trace, at in zip(figure.data, range(len(drawn)), strict=True):
        trace.update({key.replace(".", "_"): values[at] for key, values in styles["run"].items()})
    buttons = [{"label": escaped(key), "method": "restyle", "args": [style]} for key, style in styles.items()]
    figure.update_layout(**LAYOUT, legend_title_text="run or setting")
    if drawn and len(buttons) > 1:
        figure.update_layout(updatemenus=[_menu(buttons)])
    return figure


def parallel_coordinates(rows: Sequence[Row], settings: Sequence[str], key: str) -> go.Figure:
    """Each row a line through its settings and numbers, coloured by what ranks."""
    able = [row for row in rows if row.rank is not None]
    drawn = [name for name in settings if name != "seed"]
    names = [*drawn[: MAX_DIMENSIONS - 3], *(k for k in ("tokens_per_s", "peak_memory_gib") if k != key), key]
    dimensions = [_dimension(title(name, rows), [row.value(name) for row in able]) for name in names]
    colour = {
        "color": [row.numbers[key].mean for row in able],
        "colorscale": "Viridis",
        "reversescale": not larger_is_better(rows, key),
        "showscale": True,
    }
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=colour, labelangle=-20, labelside="top"))
    return figure.update_layout(**LAYOUT | {"margin": {"l": 90, "r": 60, "t": 120, "b": 40}})


def pareto_scatter(rows: Sequence[Row], settings: Sequence[str], key: str) -> go.Figure:
    """What the ranked number costs in memory, time, speed or parameters; the line is the Pareto front."""
    able = [row for row in rows if row.rank is not None]
    costs = [cost for cost in COSTS if cost != key and any(cost in row.numbers for row in able)]
    figure = go.Figure()
    for cost in costs:
        known = [row for row in able if cost in row.numbers]
        figure.add_traces([_runs_as_points(known, settings, cost, key), _front(known, cost, key)])
    for trace in figure.data[2:]:
        trace.visible = False
    figure.update_layout(**LAYOUT, yaxis_title=escaped(title(key, rows)))
    if costs:
        figure.update_layout(xaxis_title=title(costs[0], rows), updatemenus=[_menu(_cost_buttons(rows, costs))])
    return figure


def _runs_as_points(rows: Sequence[Row], settings: Sequence[str], cost: str, key: str) -> go.Scatter:
    sds = [row.numbers[key].sd if row.numbers[key].n > 1 else 0.0 for row in rows]
    return go.Scatter(
        x=[row.numbers[cost].mean for row in rows],
        y=[row.numbers[key].mean for row in rows],
        error_y={"array": sds, "visible": any(sds)},
        mode="markers",
        marker={"size": 9},
        name="runs",
        text=["<br>".join([escaped(row.name), *_settings(row, settings)]) for row in rows],
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    )


def _front(rows: Sequence[Row], cost: str, key: str) -> go.Scatter:
    """The border of what some run reaches."""
    front = sorted((rows[at].numbers[cost].mean, rows[at].numbers[key].mean) for at in pareto(rows, (cost, key)))
    shape = "vh" if larger_is_better(rows, cost) else "hv"
    return go.Scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"shape": shape, "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
    )


def _cost_buttons(rows: Sequence[Row], costs: Sequence[str]) -> list[dict[str, Any]]:
    """A choice of what is plotted against: each shows its two traces."""
    return [
        {
            "label": title(cost, rows),
            "method": "update",
            "args": [
                {"visible": [n // 2 == at for n in range(2 * len(costs))]},
                {"xaxis.title.text": title(cost, rows)},
            ],
        }
        for at, cost in enumerate(costs)
    ]


def _menu(buttons: list[dict[str, Any]]) -> dict[str, Any]:
    return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.2, "yanchor": "top"}


def importance_bars(shares: Mapping[str, float]) -> go.Figure:
    """A bar a setting."""
    names = list(shares)[::-1]
    bars = go.Bar(x=[shares[name] for name in names], y=[escaped(name) for name in names], orientation="h")
    return go.Figure(bars).update_layout(**LAYOUT | {"height": 140 + 32 * len(names)}, xaxis_title="share of 1")


def pareto(rows: Sequence[Row], keys: tuple[str, str]) -> list[int]:
    """The places of the rows than which no other is better in both numbers."""
    signs = [-1.0 if larger_is_better(rows, key) else 1.0 for key in keys]
    costs = [[sign * row.numbers[key].mean for sign, key in zip(signs, keys, strict=True)] for row in rows]
    return [
        at
        for at, cost in enumerate(costs)
        if not any(other[0] <= cost[0] and other[1] <= cost[1] and other != cost for other in costs)
    ]


def _settings(row: Row, settings: Sequence[str]) -> list[str]:
    return [f"{escaped(key)}={escaped(shown(row, key))}" for key in settings if key in row.first.settings]


def _style(values: Sequence[str], drawn: Sequence[tuple[Row, Run, int]]) -> dict[str, list[Any]]:
    """What `restyle` sets on each curve, so that curves of one value share colour, name and place in the legend."""
    kinds = sorted(set(values), key=lambda value: (number(_number(value)) is None, _number(value) or 0, value))
    if all(_number(kind) is not None for kind in kinds) and len(kinds) > 1:
        colours = sample_colorscale("Viridis", [n / (len(kinds) - 1) for n in range(len(kinds))])
    else:
        colours = [qualitative.Plotly[n % len(qualitative.Plotly)] for n in range(len(kinds))]
    colour_of = dict(zip(kinds, colours, strict=True))
    first = [value not in values[:at] for at, value in enumerate(values)]
    return {
        "name": [escaped(value) for value in values],
        "legendgroup": [escaped(value) for value in values],
        "showlegend": first,
        "line.color": [colour_of[value] for value in values],
        "marker.color": [colour_of[value] for value in values],
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _thinned(steps: list[float], values: list[float], share: int) -> tuple[list[float], list[float]]:
    """At most about `share` points, the last one among them, with as many digits as can be seen."""
    stride = max(1, math.ceil(len(steps) / share))
    kept = [at for at in range(len(steps)) if at % stride == 0 or at == len(steps) - 1]
    return [steps[at] for at in kept], [float(f"{values[at]:.5g}") for at in kept]


def _dimension(label: str, values: Sequence[Any]) -> dict[str, Any]:
    """An axis: a scale of numbers, logarithmic where they span a decade, or a tick for each choice."""
    known = [found for value in values if (found := number(value)) is not None]
    if len(known) < len(values):
        kinds = sorted({json.dumps(value, default=str) for value in values})
        ticks = {kind: at for at, kind in enumerate(kinds)}
        places = [ticks[json.dumps(value, default=str)] for value in values]
        texts = [escaped(kind.strip('"')) for kind in kinds]
        return {"label": escaped(label), "values": places, "tickvals": list(ticks.values()), "ticktext": texts}
    if known and min(known) > 0 and max(known) >= 10 * min(known):
        kinds_shown = sorted(set(known)) if len(set(known)) <= 8 else [10.0**n for n in _decades(known)]
        ticks_at = [math.log10(value) for value in kinds_shown]
        texts = [f"{value:.3g}" for value in kinds_shown]
        logs = [math.log10(value) for value in known]
        return {"label": escaped(label), "values": logs, "tickvals": ticks_at, "ticktext": texts}
    return {"label": escaped(label), "values": known}


def _decades(values: Sequence[float]) -> range:
    return range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
