"""Rows as the model reads them, for a person: what is learned, what is not, and what is padding."""

from __future__ import annotations

import html
from collections.abc import Iterable
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llama_lab.data.audit import Finding, Level
from llama_lab.data.templates import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Kind(StrEnum):
    """What becomes of a token in training."""

    learned = "learned"
    given = "given"
    padding = "padding"


STYLES = {Kind.learned: "bold green", Kind.given: "", Kind.padding: "dim red"}
LEGEND = "⟦learned⟧  given  ·padding·"

Span = tuple[Kind, list[int]]


def spans(row: dict[str, Any], padded_to: int) -> list[Span]:
    """The row's tokens in runs of one kind, with the padding that its batch gives it."""
    kinds = [Kind.given if label == IGNORED else Kind.learned for label in row["labels"]]
    pairs = zip(kinds, row["input_ids"], strict=True)
    found: list[Span] = [(kind, [i for _, i in group]) for kind, group in groupby(pairs, key=lambda pair: pair[0])]
    if padded_to > len(kinds):
        found.append((Kind.padding, [0] * (padded_to - len(kinds))))
    return found


def as_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, padded_to: int, *, ids: bool = False) -> Text:
    """One row for a terminal; brackets say the same as the colours, where there are none."""
    text = Text()
    for kind, tokens in spans(row, padded_to):
        if kind is Kind.padding:
            text.append(f"·{len(tokens)} x {tokenizer.pad_token}·", STYLES[kind])
            continue
        said = _with_ids(tokens, tokenizer) if ids else str(tokenizer.decode(tokens))
        text.append(f"⟦{said}⟧" if kind is Kind.learned else said, STYLES[kind])
    return text


def _with_ids(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return "".join(f"{tokenizer.decode([token])}|{token} " for token in tokens)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="generator" content="llama_lab"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .7rem; border-radius: .4rem; }}
.learned {{ background: #c9efcf; }} .given {{ color: #444; }} .padding {{ color: #b33; }}
.failure {{ color: #b00020; font-weight: 600; }} .warning {{ color: #8a5a00; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }}
</style>
<h1>{title}</h1>
<table>{findings}</table>
<p><span class="learned">learned</span> <span class="given">given</span> <span class="padding">padding</span>.
Hold the pointer over a run of tokens to see their ids.</p>
{rows}
</html>
"""


def as_page(
    title: str, findings: list[Finding], rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> str:
    """A page to scroll through: the checks, then the rows batch by batch. Needs no network; all text is escaped."""
    lines = "".join(
        f'<tr class="{f.level}"><td>{_sign(f.level)}</td><td>{html.escape(f.check)}</td>'
        f"<td>{html.escape(f.message)}</td></tr>"
        for f in findings
    )
    blocks = []
    for number, row in enumerate(rows):
        batch = rows[number - number % batch_size :][:batch_size]
        padded_to = max(len(other["input_ids"]) for other in batch)
        blocks.append(f"<h3>Row {number + 1}</h3><pre>{_html_of(row, tokenizer, padded_to)}</pre>")
    return PAGE.format(title=html.escape(title), findings=lines, rows="\n".join(blocks))


def _html_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, padded_to: int) -> str:
    parts = []
    for kind, tokens in spans(row, padded_to):
        is_padding = kind is Kind.padding
        said = f"{len(tokens)} x {tokenizer.pad_token}" if is_padding else str(tokenizer.decode(tokens))
        title = "" if is_padding else " ".join(map(str, tokens))
        parts.append(f'<span class="{kind}" title="{title}">{html.escape(said)}</span>')
    return "".join(parts)


def _sign(level: Level) -> str:
    return {Level.ok: "ok", Level.warning: "warning", Level.failure: "FAILS"}[level]
