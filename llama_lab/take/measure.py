"""`evaluate`: what runs are worth on held-out rows and on tasks, into evaluation.json and to W&B."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_lab.choices import DataFormat
from llama_lab.compare.diff import FILE_WIDTH
from llama_lab.data.splits import build_splits
from llama_lab.evaluate import score
from llama_lab.model import load_base, set_special_tokens
from llama_lab.rundir import write_json
from llama_lab.take.load import load_on, load_tokenizer_of
from llama_lab.take.options import EVALUATION_FILE, EvaluateOptions
from llama_lab.take.preferences import score_preferences
from llama_lab.take.source import Source
from llama_lab.take.tasks import run_tasks, task_manager
from llama_lab.take.ticker import Ticker
from llama_lab.tracking import WandbTracking, open_tracking

SCHEMA = 1
"""Version of evaluation.json."""


@dataclass(kw_only=True)
class Evaluation:
    """What was measured of one adapter; the same numbers of its base where they were asked for."""

    source: Source
    data: dict[str, Any]
    """Which rows."""
    numbers: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """evaluation.json."""
        return {
            "schema": SCHEMA,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": self.data,
            **self.numbers,
            "base": self.base,
            "difference": {name: self.numbers[name] - value for name, value in self.base.items()},
        }


def evaluate(sources: list[Source], options: EvaluateOptions) -> int:
    """Measure each source, write its evaluation.json, and print one table; the exit code.

    Raises:
        LlamaLabError: something cannot be loaded or read; what was measured before it is written.
    """
    found = []
    with Ticker() as tick:
        if options.tasks:
            tick("reading the tasks of lm-eval")
            task_manager(options.tasks)
        for source in sources:
            found.append(_measure(source, options, tick))
            write_json(folder_of(source) / EVALUATION_FILE, found[-1].as_json())
            _to_wandb(found[-1])
    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(_table(found))
    for one in found:
        print(f"Written: {folder_of(one.source) / EVALUATION_FILE}")
    return 0


def folder_of(source: Source) -> Path:
    """Where the evaluation of a source lies: in the run's folder, or beside the weights of another adapter."""
    is_of_run = source.run_dir is not None and source.adapter == source.run_dir.adapter
    return source.run_dir.path if source.run_dir and is_of_run else source.adapter


def _measure(source: Source, options: EvaluateOptions, tick: Ticker) -> Evaluation:
    config = source.config
    tick(f"{source.path}: reading rows")
    tokenizer = load_tokenizer_of(source)
    splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)

    def numbers_of(model: Any, of: str) -> dict[str, float]:
        tell = lambda what: tick(f"{source.path}, {of}: {what}")  # noqa: E731
        if splits.format is DataFormat.preference:
            return {}
        found = score(model, tokenizer, splits.valid, config.evaluate, config.dataset.metrics, tell)
        numbers = dict(found.metrics)
        if not math.isnan(found.eval_loss):  # prompts alone have none
            numbers = {"eval_loss": found.eval_loss, "perplexity": math.exp(min(found.eval_loss, 700.0))} | numbers
        if options.tasks:
            tell(f"tasks {', '.join(options.tasks)}")
            numbers |= run_tasks(
                model,
                tokenizer,
                options.tasks,
                limit=options.limit,
                batch_size=config.evaluate.batch_size,
                chat_template=options.chat_template,
            )
        return numbers

    tick(f"{source.path}: loading the base")
    base: Any = load_base(config.model, config.quant)
    set_special_tokens(base, tokenizer)
    # before the adapter, which may change the weights below it (PiSSA)
    of_base = numbers_of(base, "base") if options.base else {}
    model: Any = load_on(base, source)
    numbers = numbers_of(model, "adapter")
    if splits.format is DataFormat.preference:
        numbers |= score_preferences(model, tokenizer, splits.valid, config.evaluate.batch_size)
    data = {"fingerprint": splits.fingerprint, "num_valid_rows": len(splits.valid.tokens)}
    return Evaluation(source=source, data=data, numbers=numbers, base=of_base)


def _to_wandb(found: Evaluation) -> None:
    """The numbers into the summary of the run's own W&B run, which is taken up again for it."""
    source = found.source
    if source.run_dir is None or folder_of(source) != source.run_dir.path:
        return
    with open_tracking(source.config.tracking, source.run_dir, source.lock) as tracking:
        if isinstance(tracking, WandbTracking):
            told = {f"evaluation/{name}": value for name, value in found.numbers.items()}
            told |= {f"evaluation/base/{name}": value for name, value in found.base.items()}
            tracking.run.log(told)
            tracking.run.summary.update(told)


def _table(found: list[Evaluation]) -> Table:
    names = list(dict.fromkeys(name for one in found for name in one.numbers))
    table = Table(title="Held-out rows and tasks", title_justify="left")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(str(one.source.path), *(_number(one.numbers.get(name)) for name in names))
        if one.base:
            gained = {name: one.numbers[name] - value for name, value in one.base.items()}
            table.add_row("  base", *(_number(one.base.get(name)) for name in names))
            table.add_row("  difference", *(_number(gained.get(name), "+.4g") for name in names), end_section=True)
    return table


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else f"{value:{form}}"
