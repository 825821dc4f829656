"""What a person sees of a run when it has ended: the same prompts before and after, the numbers, and where all lies."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_lab.rundir import RunDir


@dataclass(kw_only=True)
class Sample:
    """One prompt with the base model's answer and the trained model's."""

    prompt: str
    before: str | None
    after: str


def samples_markdown(samples: list[Sample]) -> str:
    """samples.md."""
    parts = ["# The same prompts, before and after training\n"]
    for sample in samples:
        parts.append(f"## {_one_line(sample.prompt)}\n")
        if sample.before is not None:
            parts.append(f"Before:\n\n{_fenced(sample.before)}\n")
        parts.append(f"After:\n\n{_fenced(sample.after)}\n")
    return "\n".join(parts)


def show(
    console: Console,
    run_dir: RunDir,
    result: dict[str, Any],
    samples: list[Sample],
    where: str,
    *,
    scores: bool = False,
) -> None:
    """Print samples, results and folders; of a reward model, which writes nothing, what it is for."""
    if samples:
        console.print(_samples_table(samples))
    console.print(_result_table(result))
    for line in _places(run_dir, where, scores=scores):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _samples_table(samples: list[Sample]) -> Table:
    table = Table(title="The same prompts, before and after", show_lines=True, title_justify="left")
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for s in samples:
        table.add_row(Text(_short(s.prompt)), Text(_short(s.before or "not asked")), Text(_short(s.after)))
    return table


def _result_table(result: dict[str, Any]) -> Table:
    table = Table(title="Results", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before = result.get("eval_loss_before")
    is_of_tokens = result.get("perplexity") is not None
    unit = "nats a token" if is_of_tokens else "the trainer's own"
    if result.get("eval_loss") is not None or "reward" not in result:  # prompts alone have none
        table.add_row(f"held-out loss ({unit})", _number(before), _number(result.get("eval_loss")))
    if is_of_tokens:
        table.add_row("perplexity", _number(_exp(before)), _number(result.get("perplexity")))
    for name, title in {"reward_margin": "reward margin", "reward": "mean reward"}.items():
        if name in result:
            table.add_row(title, _number(result.get(f"{name}_before")), _number(result[name]))
    titles = {"reward_accuracy": "reward accuracy", "exact_match": "exact match", "composes": "composes"}
    for name, title in titles.items():
        if name in result:
            table.add_row(title, _percent(result.get(f"{name}_before")), _percent(result[name]))
    table.add_section()
    share = f"{result['num_trainable_params'] / result['num_params']:.2%}"
    table.add_row("trained parameters", "", f"{result['num_trainable_params']:,} ({share})")
    table.add_row("optimizer steps", "", f"{result['num_steps']}")
    table.add_row("training time", "", f"{result['train_runtime_s']:.0f} s")
    table.add_row("speed", "", f"{result['tokens_per_s']:.0f} tokens/s")
    table.add_row("peak memory", "", f"{result['peak_memory_gib']:.2f} GiB")
    return table


def _places(run_dir: RunDir, where: str, *, scores: bool) -> list[str]:
    lines = [f"Adapter:  {run_dir.adapter}"]
    if not scores:
        lines.append(f"Samples:  {run_dir.samples}")
    lines.append(f"Numbers:  {run_dir.result} and {run_dir.metrics.name} beside it")
    if where:
        lines.append(where)
    if scores:
        how = [f"trainer.reward_model={run_dir.path}", "trainer.rewards=[reward_model]"]
        lines.append(f"Use it:   python -m llama_lab trainer=grpo dataset=sample_rewards {shlex.join(how)}")
    else:
        lines.append(f'Try it:   python -m llama_lab generate {shlex.quote(str(run_dir.path))} "your request"')
    return lines


def _exp(value: float | None) -> float | None:
    from math import exp

    return None if value is None else exp(min(value, 700.0))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fenced(text: str) -> str:
    longest = max((len(run) for run in text.replace("\n", " ").split(" ") if set(run) == {"`"}), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
