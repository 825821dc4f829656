"""What `plan` and `data` print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_lab.data.findings import Level
from llama_lab.data.view import LEGEND, as_text
from llama_lab.own_settings import SAMPLING
from llama_lab.plan import Options, Plan, parameters

SIGNS = {
    Level.ok: Text("ok", "green"),
    Level.warning: Text("warning", "yellow"),
    Level.failure: Text("FAILS", "bold red"),
}


def show_plan(console: Console, made: Plan, options: Options, throughput: tuple[float, str] | None) -> None:
    """Rows, checks, counts, memory, time, and the verdict."""
    show_data(console, made, options, verdict=False)
    console.print(_counts(made))
    from llama_lab.plan_memory import memory_tables

    for table in memory_tables(made):
        console.print(table)
    for line in _time(made, throughput):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _verdict(console, made)


def show_data(console: Console, made: Plan, options: Options, *, verdict: bool = True) -> None:
    """Rows and checks."""
    if made.splits is not None and made.tokenizer is not None:
        size = made.config.trainer.per_device_train_batch_size
        tokens = made.splits.train.tokens
        rows = [tokens[i] for i in range(min(max(size, options.num_rows), len(tokens)))]
        console.print(f"The first rows, format {made.splits.format}:  {LEGEND}", markup=False, highlight=False)
        for number, row in enumerate(rows[: options.num_rows]):
            batch = rows[number - number % size :][:size]
            longest = max(len(other["input_ids"]) for other in batch)
            said = Text(f"{number + 1}  ", "dim") + as_text(row, made.tokenizer, longest, ids=options.ids)
            console.print(said, soft_wrap=True, highlight=False)
        for note in made.splits.notes:
            console.print(f"Note: {note}.", markup=False, highlight=False, soft_wrap=True)
    console.print(_checks(made), soft_wrap=True, highlight=False)
    if verdict:
        _verdict(console, made)


def _checks(made: Plan) -> Text:
    """One line a check; no table, since a terminal's width must not break a message that someone searches for."""
    width = max((len(finding.check) for finding in made.findings), default=0)
    lines = []
    for finding in made.findings:
        sign = SIGNS[finding.level]
        lines.append(Text.assemble(sign, " " * (9 - len(sign)), f"{finding.check:{width}}  ", finding.message))
    return Text("\n").join([Text("Checks", "italic"), *lines, Text()])


def _counts(made: Plan) -> Table:
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in _numbers(made):
        table.add_row(name, value)
    return table


def _numbers(made: Plan) -> list[tuple[str, str]]:
    config, rows = made.config, []
    if made.splits is not None and made.schedule is not None:
        s, trainer = made.schedule, config.trainer
        is_sampling = trainer.name in SAMPLING  # its answers are as long as they come out
        padding = 1 - s.num_real_tokens / s.num_padded_tokens
        rows += [
            ("training rows, held-out rows", f"{len(made.splits.train.tokens):,}, {len(made.splits.valid.tokens):,}"),
            ("tokens of one pass" + ", at most" * is_sampling, f"{s.num_real_tokens:,}"),
            *(
                []
                if is_sampling
                else [("  learned", f"{made.num_learned:,} ({made.num_learned / s.num_real_tokens:.0%})")]
            ),
            ("  with padding", f"{s.num_padded_tokens:,} ({padding:.0%} padding)"),
            ("longest row" if not config.dataset.packing else "longest block", f"{made.longest:,} tokens"),
            (
                ("answers" if is_sampling else "rows") + " at once x accumulation",
                f"{trainer.per_device_train_batch_size} x {trainer.gradient_accumulation_steps}",
            ),
            ("optimizer steps", f"{s.num_steps:,} ({s.num_epochs:.3g} passes)"),
            ("  of them warm-up", f"{s.num_warmup_steps:,}"),
        ]
    if counted := parameters(made):
        trainable, total = counted
        rows += [("parameters", f"{total:,}"), ("  trained", f"{trainable:,} ({trainable / total:.2%})")]
    return rows


def _time(made: Plan, throughput: tuple[float, str] | None) -> list[str]:
    if made.schedule is None:
        return []
    s = made.schedule
    tokens = s.num_real_tokens * s.num_epochs
    if throughput is None:
        return [f"Time: unknown. Type --tokens-per-s NUMBER to have it for {tokens:,.0f} tokens."]
    per_second, source = throughput
    return [
        f"Time: {_duration(tokens / per_second)} of training: {tokens:,.0f} tokens at {per_second:,.0f}/s, {source}."
    ]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _verdict(console: Console, made: Plan) -> None:
    said: dict[int, tuple[str, Any]] = {
        0: ("Fine: nothing speaks against this run.", "green"),
        1: ("Fine, with warnings.", "yellow"),
        2: ("This run would fail.", "bold red"),
    }
    console.print(Text(*said[made.exit_code]))
