"""The study's own W&B run, beside those of its trials: plots, the table of all trials, and the best settings."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_lab.choices import Tracker, TrackingMode
from llama_lab.config import TrackingSettings
from llama_lab.sweep.design import Design
from llama_lab.sweep.files import best_command, trial_table
from llama_lab.sweep.rows import Row, ranked
from llama_lab.sweep.show import importances
from llama_lab.tracking import resolve_mode
from llama_lab.wandb_run import start_wandb, sync_command

if TYPE_CHECKING:
    import wandb
    from optuna import Study
    from optuna.trial import FrozenTrial
    from plotly.graph_objects import Figure

RUN_ID = "llama_lab:wandb"
"""User attribute of the study: the id of its W&B run, which a later start goes on with."""
JOB_TYPE = "study"


def log_study(
    design: Design, study: Study, rows: Sequence[Row], winner: Row, tracking: TrackingSettings
) -> Iterator[str]:
    """Log the study to W&B where its trials are logged; yields lines for the person. It never stops the study.

    Args:
        rows: all trials.
        winner: the one of them that the study ends with.
    """
    if tracking.backend is not Tracker.wandb:
        return
    try:
        mode = resolve_mode(tracking)
        if mode is TrackingMode.disabled:
            return
        with _study_run(design, study, tracking, mode) as run:
            _log_trials(run, design, rows)
            yield from _log_figures(run, design, study, rows)
            _log_winner(run, design, winner)
            yield sync_command(design.folder) if run.offline else f"W&B:         {run.url}"
    except Exception as error:
        yield f"W&B took no run of the study: {type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _study_run(design: Design, study: Study, tracking: TrackingSettings, mode: TrackingMode) -> Iterator[wandb.Run]:
    if RUN_ID not in study.user_attrs:
        study.set_user_attr(RUN_ID, uuid.uuid4().hex[:12])
    settings, name = design.settings, design.settings.study_name
    run = start_wandb(
        replace(tracking, group=tracking.group or name, job_type=JOB_TYPE),
        mode,
        folder=design.folder,
        run_id=study.user_attrs[RUN_ID],
        name=name,
        tags=tracking.tags or [JOB_TYPE, str(settings.sampler.name), *design.objectives],
        config={
            "study": name,
            "n_trials": settings.n_trials,
            "sampler": str(settings.sampler.name),
            "pruner": str(settings.pruner.name),
            "objectives": dict(zip(design.objectives, map(str, design.directions), strict=True)),
            "settings": design.identity,
        },
    )
    with run:
        yield run


def _log_trials(run: wandb.Run, design: Design, rows: Sequence[Row]) -> None:
    """The table, and the objectives over the trials as W&B's own curves."""
    import wandb

    run.define_metric("trial", hidden=True)
    run.define_metric("trial/*", step_metric="trial")
    best: list[float] = []
    sign = -1.0 if str(design.directions[0]) == "maximize" else 1.0
    for row in (row for row in rows if row.state == "done"):
        values = {f"trial/{name}": value for name, value in zip(design.objectives, row.values, strict=True)}
        if len(design.objectives) == 1:
            best.append(sign * row.values[0])
            values["trial/best"] = sign * min(best)
        run.log({"trial": row.number, **values})
    head, *lines = trial_table(design, rows)
    # a column of W&B's has one type, and a trial that failed has no numbers
    cells = [[None if cell == "" else cell for cell in line] for line in lines]
    run.log({"trials": wandb.Table(columns=head, data=cells, allow_mixed_types=True)})


def _log_figures(run: wandb.Run, design: Design, study: Study, rows: Sequence[Row]) -> Iterator[str]:
    import wandb

    for name, draw in _figures(design, study, ranked(rows, design.directions)).items():
        try:
            figure = draw()
        except (ValueError, RuntimeError, ImportError) as error:  # of a single trial, of equal values
            yield f"W&B has no figure {name} of this study: {error}"
            continue
        if figure is not None:
            run.log({name: wandb.Plotly(figure)})


def _figures(design: Design, study: Study, best: Sequence[Row]) -> dict[str, Callable[[], Figure | None]]:
    """What draws each figure; of several objectives one for each."""
    from optuna import visualization as plots

    found: dict[str, Callable[[], Figure | None]] = {}
    several = len(design.objectives) > 1
    for number, objective in enumerate(design.objectives):
        end = f"/{objective}" if several else ""
        target: dict[str, Any] = {"target": partial(_value, number) if several else None, "target_name": objective}
        found[f"history{end}"] = partial(plots.plot_optimization_history, study, **target)
        found[f"parallel_coordinates{end}"] = partial(plots.plot_parallel_coordinate, study, **target)
        found[f"importance{end}"] = partial(_importance, design, study, best, objective)
    found["pareto_front"] = partial(_pareto_front, design, study)
    return found


def _value(number: int, trial: FrozenTrial) -> float:
    return float(trial.values[number])


def _importance(design: Design, study: Study, best: Sequence[Row], objective: str) -> Figure | None:
    """None of too few trials, of which nothing can be said."""
    from llama_lab.compare.figures import importance_bars

    shares = importances(design, study, best).get(objective)
    return importance_bars(shares) if shares else None


def _pareto_front(design: Design, study: Study) -> Figure:
    """Of the objectives; of a single one against memory, time, speed and parameters."""
    from optuna import visualization as plots

    if len(design.objectives) > 1:
        return plots.plot_pareto_front(study, target_names=design.objectives)
    from llama_lab.compare.figures import pareto_scatter
    from llama_lab.compare.show import Options, comparison

    found = comparison(Options(paths=[design.folder]))
    return pareto_scatter(found.rows, found.columns.settings, found.key)


def _log_winner(run: wandb.Run, design: Design, row: Row) -> None:
    run.summary.update({f"best/{name}": value for name, value in row.point.items()})
    run.summary.update({f"best/{n}": value for n, value in zip(design.objectives, row.values, strict=True)})
    run.summary.update({"best/trial": row.number, "best/command": best_command(design)})
