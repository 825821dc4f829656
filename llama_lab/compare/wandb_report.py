"""`--wandb-report`: the comparison as a report on W&B, by W&B's own package; it finds the runs there by their ids."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llama_lab.compare import table
from llama_lab.compare.read import Run
from llama_lab.compare.rows import companions
from llama_lab.errors import ConfigError, RunError

if TYPE_CHECKING:
    from llama_lab.compare.show import Comparison

API_TIMEOUT_S = 20
CONNECT_TIMEOUT_S = 10
MAX_AXES = 12
STUDY_PLOTS = ("history", "importance", "parallel_coordinates", "pareto_front", "trials")
"""What the run of a study has: llama_lab/sweep/study_run.py."""


def write_report(found: Comparison) -> str:
    """Make the report; its address.

    Raises:
        ConfigError: W&B's package, a key or the network is missing.
        RunError: none of the runs was tracked by W&B, or W&B refuses the report.
    """
    _check_ready()
    tracked = [run for run in found.runs if run.settings.get("tracking.backend") == "wandb" and run.lock.get("id")]
    if not tracked:
        raise RunError(
            f"None of the {len(found.runs)} runs was tracked by W&B, so a report would be empty. Type --html FILE for "
            "a page of them."
        )
    entity = _entity()
    places = Counter(_place(run, entity) for run in tracked)
    try:
        return _saved(found, tracked, places.most_common(1)[0][0], sorted(places), entity)
    except Exception as error:  # the package raises what its GraphQL client raises
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"W&B did not take the report: {type(error).__name__}: {reason}") from error


def _check_ready() -> None:
    if find_spec("wandb_workspaces") is None:
        raise ConfigError(
            "--wandb-report needs the package wandb-workspaces, which is not installed. Type: "
            "python -m pip install wandb-workspaces"
        )
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise ConfigError(
            f"--wandb-report needs W&B, and WANDB_MODE is {os.environ['WANDB_MODE']}. Type: unset WANDB_MODE; or "
            "--html FILE for a page that needs no network."
        )
    from llama_lab.wandb_run import has_key

    if not has_key():
        raise ConfigError(
            "--wandb-report needs a W&B account, and no key is set. Type `wandb login` once, or set WANDB_API_KEY; or "
            "type --html FILE for a page that needs none."
        )
    _check_reachable()


def _check_reachable() -> None:
    """W&B's client tries for minutes where nobody answers."""
    address = urlsplit(_address())
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(error) from error


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _unreachable(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"--wandb-report: {_address()} cannot be reached, or does not know the key: {reason} Type --html FILE for a "
        "page that needs no network."
    )


def _entity() -> str:
    """The account's own entity.

    Raises:
        ConfigError: W&B does not answer, or does not know the key.
    """
    import wandb

    try:
        return str(wandb.Api(timeout=API_TIMEOUT_S).default_entity)
    except Exception as error:
        raise _unreachable(error) from error


def _saved(
    found: Comparison, tracked: Sequence[Run], place: tuple[str, str], places: Sequence[tuple[str, str]], entity: str
) -> str:
    from wandb_workspaces.reports import v2 as wr

    names = sorted({str(run.settings.get("tracking.group")) for run in tracked if run.settings.get("tracking.group")})
    title = f"{', '.join(names) or f'{len(tracked)} runs'}, compared {time.strftime('%Y-%m-%d %H:%M')}"
    # a runset is of one project, so runs of several stand in several
    runsets = [_runset(tracked, owner, project, entity) for owner, project in places]
    blocks: list[Any] = [
        *(wr.P(line) for line in [*found.verdict, *found.notes]),
        wr.MarkdownBlock(table.as_markdown(found.rows, found.columns)),
        wr.PanelGrid(runsets=runsets, panels=_panels(found)),
    ]
    if names:
        theirs = f"{_any_of('Group', names)} and JobType == 'study'"
        studies = [wr.Runset(entity=owner, project=name, name="studies", filters=theirs) for owner, name in places]
        plots = wr.MediaBrowser(media_keys=list(STUDY_PLOTS), num_columns=2)
        blocks += [wr.H2("Studies"), wr.PanelGrid(runsets=studies, panels=[plots])]
    report = wr.Report(entity=place[0], project=place[1], title=title[:128], blocks=blocks, width="fluid")
    report.save()
    return str(report.url)


def _runset(tracked: Sequence[Run], owner: str, project: str, entity: str) -> Any:
    from wandb_workspaces.reports import v2 as wr

    ids = [str(run.lock["id"]) for run in tracked if _place(run, entity) == (owner, project)]
    return wr.Runset(entity=owner, project=project, name=f"{len(ids)} runs", filters=_any_of("ID", ids))


def _place(run: Run, entity: str) -> tuple[str, str]:
    """Owner and project of a run."""
    return str(run.settings.get("tracking.entity") or entity), str(run.settings.get("tracking.project"))


def _any_of(key: str, values: Sequence[str]) -> str:
    return f"{key} in {list(values)!r}"


def _panels(found: Comparison) -> list[Any]:
    """The figures of the page as W&B's own panels."""
    from wandb_workspaces.reports import v2 as wr

    follows = {name for names in companions(found.rows, found.columns.settings).values() for name in names}
    settings = [name for name in found.columns.settings if name not in follows][:MAX_AXES]
    key = found.key_name or "eval_loss"
    axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name), display_name=name) for name in settings]
    axes.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(key), display_name=key))
    return [
        wr.LinePlot(x="step", y=["train/loss"], title="train/loss"),
        wr.LinePlot(x="step", y=["eval/loss"], title="eval/loss"),
        wr.ParallelCoordinatesPlot(columns=axes, title="settings"),
        wr.ScatterPlot(x=wr.SummaryMetric("peak_memory_gib"), y=wr.SummaryMetric(key), title=f"{key} against memory"),
        wr.ParameterImportancePlot(with_respect_to=key),
        wr.RunComparer(diff_only="split"),
    ]
