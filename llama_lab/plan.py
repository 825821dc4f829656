"""The verbs `plan` and `data`: what a run would train on and what it would cost, found without a GPU or the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llama_lab.checks import check_layers
from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.errors import LlamaLabError
from llama_lab.pages import check_page, write_page
from llama_lab.params import ModelShape, count_params, shape_of
from llama_lab.preference_checks import check_unanswered
from llama_lab.process import prepare, quiet_libraries
from llama_lab.stages import stages_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama_lab.data.batches import Schedule
    from llama_lab.data.findings import Finding
    from llama_lab.data.splits import Splits


@dataclass(kw_only=True)
class Options:
    """What the words of the verb ask for, beside the run's own settings."""

    num_rows: int = 3
    """Rows to show."""
    ids: bool = False
    """Show each token with its id."""
    html: Path | None = None
    """Write a page with the rows here."""
    tokens_per_s: float | None = None
    """Throughput to count with; None looks for a finished run of the same kind."""


@dataclass(kw_only=True)
class Plan:
    """What is known of a run before it starts."""

    config: RunConfig
    shape: ModelShape | None
    tokenizer: PreTrainedTokenizerBase | None = None
    splits: Splits | None = None
    findings: list[Finding] = field(default_factory=list)
    schedule: Schedule | None = None
    longest: int = 0
    """Tokens of the longest row or block of training; of pairs both answers."""
    num_learned: int = 0
    """Tokens that are learned in one pass over the training rows."""

    @property
    def exit_code(self) -> int:
        """0 fine, 1 warnings, 2 the run would fail."""
        from llama_lab.data.findings import Level

        levels = {finding.level for finding in self.findings}
        return 2 if Level.failure in levels else 1 if Level.warning in levels else 0


def plan(words: list[str], options: Options) -> int:
    """Print what the run of these words would do and cost; the exit code (see Plan.exit_code).

    Raises:
        LlamaLabError: the words compose no run.
    """
    config, console = compose_words(words), Console()
    if options.html:
        check_page(options.html)
    codes = []
    for stage in stages_of(config, words):
        console.print(f"\nStage {stage.number} of {len(config.stages)}, {stage.name}", style="bold", highlight=False)
        codes.append(_plan(console, stage.config, options))
    return max(codes) if codes else _plan(console, config, options)


def _plan(console: Console, config: RunConfig, options: Options) -> int:
    from llama_lab.plan_view import show_plan

    made = _make(config)
    show_plan(console, made, options, _throughput(made.config, options))
    _write_page(console, made, options)
    return made.exit_code


def data(words: list[str], options: Options) -> int:
    """Print the rows and their checks alone."""
    from llama_lab.plan_view import show_data

    config, console = compose_words(words), Console()
    if options.html:
        check_page(options.html)
    made = _make(config)
    show_data(console, made, options)
    _write_page(console, made, options)
    return made.exit_code


def _make(config: RunConfig) -> Plan:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: a plan takes no memory of a GPU in use
    if (wanted := config.trainer.micro_batch_size) not in (None, "auto"):
        config = replace(config, trainer=config.trainer.with_micro_batch(int(wanted)))
    prepare(config)
    return planned(config)


def planned(config: RunConfig) -> Plan:
    """What is known of a run before it starts; rows that cannot be read are a finding."""
    quiet_libraries(config)
    shape, unreadable = _shape(config)
    made = Plan(config=config, shape=shape)
    try:
        _read(made)
    except LlamaLabError as error:
        _add_failure(made, "rows", error)
    if unreadable and made.tokenizer is not None:  # else it is the same that is told already
        _add_failure(made, "base", unreadable)
    try:
        if made.shape is not None:
            check_layers(config.lora, made.shape.num_layers)
    except LlamaLabError as error:
        _add_failure(made, "adapter", error)
    return made


def _add_failure(made: Plan, check: str, error: LlamaLabError) -> None:
    from llama_lab.data.findings import Finding, Level

    made.findings.append(Finding(level=Level.failure, check=check, message=str(error)))


def _read(made: Plan) -> None:
    import numpy as np

    from llama_lab.data.audit import audit, numbers_of
    from llama_lab.data.batches import schedule, training_rows
    from llama_lab.data.splits import build_splits
    from llama_lab.model import load_tokenizer
    from llama_lab.preference_batches import lengths_at_once, lengths_of_pass

    config = made.config
    made.tokenizer = load_tokenizer(config.model)
    made.splits = build_splits(config.dataset, made.tokenizer, seed=config.seed, trainer=config.trainer.name)
    check_unanswered(config, made.splits.format)
    vocab_size = made.shape.vocab_size if made.shape else len(made.tokenizer)
    made.findings = audit(made.splits, made.tokenizer, config.dataset, vocab_size)
    rows = training_rows(made.splits.train.tokens, config.dataset)
    numbers = numbers_of(rows, made.tokenizer)
    lengths = np.array(lengths_of_pass(lengths_at_once(rows, config.trainer), config.trainer))
    made.schedule = schedule(lengths, config.trainer, config.dataset, seed=config.seed)
    made.longest, made.num_learned = int(lengths.max()), int(numbers.num_learned.sum())


def _shape(config: RunConfig) -> tuple[ModelShape | None, LlamaLabError | None]:
    """From the model's own config where it can be read, else from the table of known models; and why it cannot be."""
    from llama_lab.model import base_shape, check_architecture

    try:
        shape = base_shape(config.model)
        check_architecture(config.model)
        return shape, None
    except LlamaLabError as error:
        return shape_of(config.model), error


def parameters(made: Plan) -> tuple[int, int] | None:
    """(trainable, all) parameters of base and adapter."""
    return count_params(made.shape, made.config.lora) if made.shape else None


def _throughput(config: RunConfig, options: Options) -> tuple[float, str] | None:
    """Tokens a second, and where the number comes from."""
    if options.tokens_per_s is not None:
        return options.tokens_per_s, "as given"
    for folder, result, lock in _finished(Path("outputs")):
        theirs = lock["config"]
        same = theirs["model"]["name"] == config.model.name and theirs["quant"]["type"] == str(config.quant.type)
        same = same and theirs["trainer"]["name"] == str(config.trainer.name)
        if same and result.get("tokens_per_s"):
            machine = lock.get("hardware") or {}
            card = ", ".join(dict.fromkeys(machine.get("gpus") or [])) or machine.get("cpu")
            return result["tokens_per_s"], f"measured in {folder}" + (f" on {card}" if card else "")
    return None


def _finished(root: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Finished runs below `root`, the newest first."""
    for path in sorted(root.glob("**/result.json"), key=lambda p: p.stat().st_mtime, reverse=True)[:200]:
        try:
            result = json.loads(path.read_text())
            lock = json.loads(path.with_name("run.json").read_text())
            lock["config"]["model"]["name"], lock["config"]["quant"]["type"], lock["config"]["trainer"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a torn file of another run is not this plan's concern
        if result.get("status") == "ok":
            yield path.parent, result, lock


def _write_page(console: Console, made: Plan, options: Options) -> None:
    if options.html is None or made.splits is None or made.tokenizer is None:
        return
    from llama_lab.data.view import as_page

    rows = [made.splits.train.tokens[i] for i in range(min(500, len(made.splits.train.tokens)))]
    name = made.config.dataset.name or made.config.dataset.path
    page = as_page(
        f"{name} as {made.config.model.name} reads it",
        made.findings,
        rows,
        made.tokenizer,
        made.config.trainer.per_device_train_batch_size,
    )
    write_page(options.html, page)
    console.print(f"Page:  {options.html}", markup=False, highlight=False, soft_wrap=True)
