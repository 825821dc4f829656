"""The files of a study: trials.csv, a line a trial, and best.yaml, the winner as a configuration that Hydra takes."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from llama_lab.compose import compose_tree
from llama_lab.csv_text import csv_text
from llama_lab.sweep.design import Design, flat, is_below
from llama_lab.sweep.outcome import NUMBERS
from llama_lab.sweep.rows import Row, pareto_front, ranked
from llama_lab.sweep.trial import LAUNCHING

TRIALS = "trials.csv"
BEST = "best.yaml"
NOT_LEARNED = ("evaluate", "generation", "tracking", "resume", "verbose", "hydra", "objective", "dataset.metrics")
"""Settings that a study may set for its trials and that change nothing of what is learned; the winner has its own."""

PLAIN_WORD = re.compile(r"[\w./][\w./-]*")


def write_trials(design: Design, rows: Sequence[Row]) -> None:
    """Write trials.csv."""
    _write(design.folder / TRIALS, csv_text(trial_table(design, rows)))


def trial_table(design: Design, rows: Sequence[Row]) -> list[list[Any]]:
    """A head, and a line a trial with its state, objectives, settings, numbers of result.json, and its error."""
    names = [dimension.name for dimension in design.space.dimensions]
    others = [name for name in NUMBERS if name not in design.objectives]
    front = {row.number for row in pareto_front(rows, design.directions)}
    table: list[list[Any]] = [["trial", "state", "best", *design.objectives, *names, *others, "deaths", "error"]]
    for row in rows:
        values = row.values or [""] * len(design.objectives)
        point = [_cell(row.point[name]) if name in row.point else "" for name in names]
        numbers = [row.numbers.get(name, "") for name in others]
        best = "yes" if row.number in front else ""
        table.append([row.number, row.state, best, *values, *point, *numbers, row.deaths, row.error])
    return table


def winning_words(design: Design, row: Row) -> list[str]:
    """The words after `python -m llama_lab` that train what the trial trained, with the evaluation of a single run.

    Call it inside a Hydra job.
    """
    point = design.space.words(row.point)
    words = [*(word for word in design.space.fixed if word.partition("=")[0] != "search"), *point]
    trial, alone = _learned(design, [*design.space.fixed, *point]), _learned(design, words)
    # what the file of search= sets beside the space
    return [*words, *(f"{key}={typed(value)}" for key, value in trial.items() if alone.get(key, ...) != value)]


class StudyFiles:
    """Writes trials.csv and best.yaml again whenever a trial has ended."""

    def __init__(self, design: Design, config_loader: ConfigLoader) -> None:
        self.design, self.config_loader = design, config_loader
        self.num_over, self.best = -1, -1

    def update(self, rows: Sequence[Row]) -> None:
        """The trials are these now."""
        num_over = sum(row.is_over for row in rows)
        if num_over == self.num_over:
            return
        self.num_over = num_over
        write_trials(self.design, rows)
        best = ranked(rows, self.design.directions)[:1]
        if best and best[0].number != self.best:
            self.write_best(best[0])

    def write_best(self, row: Row) -> None:
        """This trial is the best."""
        self.best = row.number
        with LAUNCHING:  # Hydra composes one run at a time
            write_best(self.design, row, winning_words(self.design, row), self.config_loader)


def write_best(design: Design, row: Row, words: Sequence[str], config_loader: ConfigLoader) -> None:
    """Write best.yaml, a configuration of its own: --config-dir FOLDER --config-name best.

    Args:
        words: what `winning_words` gave.
    """
    defaults: list[Any] = ["config"]
    tree = OmegaConf.create({})
    for override in OverridesParser.create(config_loader=config_loader).parse_overrides(list(words)):
        key = override.get_key_element().lstrip("+")
        if config_loader.get_group_options(override.key_or_group):
            defaults.append({f"override /{key}": override.value()})
        else:
            OmegaConf.update(tree, key, override.value(), force_add=True)
    content = {"defaults": [*defaults, "_self_"]} | OmegaConf.to_container(tree)  # type: ignore[operator]
    if design.own_folders:
        content["hydra"] = {"searchpath": [f"file://{folder}" for folder in design.own_folders]}
    found = ", ".join(f"{n} {v:.6g}" for n, v in zip(design.objectives, row.values, strict=True))
    header = f"# The best of the study {design.settings.study_name}: trial {row.number}, {found}.\n"
    header += f"# Run: {best_command(design)}\n"
    _write(design.folder / BEST, header + OmegaConf.to_yaml(OmegaConf.create(content)))


def best_command(design: Design) -> str:
    """The command that trains what best.yaml says."""
    return f"python -m llama_lab --config-dir {shlex.quote(str(design.folder))} --config-name best"


def words_command(design: Design, words: Sequence[str]) -> str:
    """The same command by its words."""
    own = [f"--config-dir={folder}" for folder in design.own_folders[:1]]
    return shlex.join(["python", "-m", "llama_lab", *own, *words])


def typed(value: Any) -> str:
    """A value as it is typed after KEY=."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(typed(item) for item in value)}]"
    if isinstance(value, str) and not PLAIN_WORD.fullmatch(value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def _learned(design: Design, words: Sequence[str]) -> dict[str, Any]:
    """The settings that decide what a run learns, by their dotted names."""
    tree = compose_tree([*design.searchpath, *words], design.config_name)
    OmegaConf.resolve(tree)
    settings = flat(OmegaConf.to_container(tree, enum_to_str=True))
    return {k: v for k, v in settings.items() if not any(is_below(k, other) for other in NOT_LEARNED)}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool) or value is None else value


def _write(path: Path, text: str) -> None:
    """The file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two machines may write the same study's
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
