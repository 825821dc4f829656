"""The table of docs/speed.md about what tokens, rank and quant type cost, from what `speed --sweep` measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.floor import row_floor_ms
from benchmarks.speed_cases import SWEPT_TOKENS

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "benchmarks" / "results" / "speed_sweep.json"
QUANTS = ("nf4", "fp4", "none")


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A measured case."""

    row: dict[str, Any]
    nominal_tokens: int
    """Of a step, padding included: what was asked for."""
    r: int
    quant: str
    floor_ms: float | None
    """The least time of its step; None for a card whose speed is not known."""


def swept(file: Path = SWEEP) -> list[Swept]:
    """The measured cases, by tokens, then rank, then quant type; none where nothing was measured."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    found = [_swept(row) for row in rows]
    return sorted(found, key=lambda case: (case.nominal_tokens, case.r, QUANTS.index(case.quant)))


def by_tokens(cases: list[Swept]) -> list[Swept]:
    """Those of rank 16 and NF4."""
    return [case for case in cases if (case.r, case.quant) == (16, "nf4")]


def by_rank(cases: list[Swept]) -> list[Swept]:
    """Those of one step's tokens and NF4."""
    return [case for case in cases if (case.nominal_tokens, case.quant) == (SWEPT_TOKENS, "nf4")]


def by_quant(cases: list[Swept]) -> list[Swept]:
    """Those of one step's tokens and rank 16."""
    return [case for case in cases if (case.nominal_tokens, case.r) == (SWEPT_TOKENS, 16)]


def speed_sweep_table(file: Path = SWEEP) -> str:
    """A section of docs/speed.md; nothing where it has not been measured."""
    cases = swept(file)
    if not cases:
        return ""
    lines = [
        "| tokens a step | r | quant | trainer.memory | tokens/s | ms a step | x floor | peak GiB | predicted GiB |",
        "|---:|---:|---|---|---:|---:|---:|---:|---:|",
        *map(_line, cases),
    ]
    title = "## What tokens, rank and quant type cost"
    picture = "![Tokens/s and peak memory over tokens a step, rank and quant type](images/speed_sweep.svg)"
    return "\n".join(["", title, "", *lines, "", _source(cases, file), "", picture, ""])


def _line(case: Swept) -> str:
    row, times = case.row, f"{case.row['step_ms'] / case.floor_ms:.2f}" if case.floor_ms else "-"
    kind = f"{case.r} | `{case.quant}` | `{row['memory']}`"
    numbers = f"{row['tokens_per_s']:,.0f} | {row['step_ms']:.0f} | {times}"
    memory = f"{row['peak_memory_gib']:.1f} | {row['predicted_gib']:.1f}"
    return f"| {row['tokens_per_step']:,.0f} | {kind} | {numbers} | {memory} |"


def _source(cases: list[Swept], file: Path) -> str:
    rows = [case.row for case in cases]
    worst = max((row["predicted_gib"] / row["peak_memory_gib"] - 1 for row in rows), key=abs)
    versions = ", ".join(f"{name} {rows[0]['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    commits = ", ".join(sorted({row.get("commit", "not recorded") for row in rows}))
    cards = " and one ".join(sorted({row["card"] for row in rows}))
    return (
        f"A Llama-2-7B-shaped model on one {cards}, LoRA on all linear layers with dropout 0.05, the level that "
        "`trainer.memory=auto` took. `int8` is not in here: TRL's trainer trains it. The largest error of a predicted "
        f"peak is {worst:+.1%}. {versions}; commit {commits}: benchmarks/results/{file.name}, by "
        f"`{rows[0]['command']}`; the floor: `benchmarks/floor.py`."
    )


def _swept(row: dict[str, Any]) -> Swept:
    words = dict(word.split("=", 1) for word in row["settings"])
    return Swept(
        row=row,
        nominal_tokens=int(words["dataset.max_length"]) * int(words["trainer.per_device_train_batch_size"]),
        r=int(words["lora.r"]),
        quant=words["quant"],
        floor_ms=row_floor_ms(row),
    )
