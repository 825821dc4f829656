"""The tables of docs/speed.md and docs/stacked.md about what a step's time goes to, by its kernels' names and times."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.floor import CARDS, OPERATIONS, SEVEN, base_flop, multiplying_ms
from llama_lab.choices import Memory

ROOT = Path(__file__).resolve().parent.parent
PROFILE = ROOT / "benchmarks" / "results" / "speed_profile.json"
BASE, FULL_SPEED = "products of the base", "the same at the card's full speed"
GROUPS = {
    BASE: "",
    FULL_SPEED: "",
    "products of LoRA": r"thinned|back_low|added_up",
    "attention": r"flash|fmha|attention|attend_",
    "dequantising": r"kDequantize",
    "between them: norms, dropout, gate, loss, AdamW": r"",
}
"""Patterns of kernels' names, the first that fits; products are told apart by their time."""
LEAST_MS = 0.05
"""A line is left out where every number in it is smaller."""
PRODUCT = r"nvjet|gemm|cublas|cutlass|splitK"


def speed_profile_table(file: Path = PROFILE) -> str:
    """Milliseconds of each kind of kernel of runs alone; nothing where it has not been measured."""
    rows = [row for row in _rows(file) if _case(row)[0] == 1]
    return _table(rows, [f"{tokens:,} tokens, `{memory}`" for _, tokens, memory in map(_case, rows)], file)


def stacked_profile_table(file: Path = PROFILE) -> str:
    """The same of stacks, each beside one of its rows alone."""
    rows, heads = [], []
    for stack in _rows(file):
        num_rows, tokens, memory = _case(stack)
        alone = next((row for row in _rows(file) if _case(row) == (1, tokens, memory)), None)
        if num_rows > 1 and alone is not None:
            rows += [stack, alone]
            heads += [f"{num_rows} x {tokens:,} tokens, `{memory}`", f"1 x {tokens:,} tokens, r=16"]
    return _table(rows, heads, file)


def _rows(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    return found


def _table(rows: list[dict[str, Any]], heads: list[str], file: Path) -> str:
    if not rows:
        return ""
    columns = [_column(row) for row in rows]
    lines = [f"| ms of a step | {' | '.join(heads)} |", "|---|" + "---:|" * len(rows)]
    for name in columns[0]:
        if any(column[name] >= LEAST_MS for column in columns):
            lines.append(f"| {name} | {' | '.join(f'{column[name]:.1f}' for column in columns)} |")
    return "\n".join([*lines, "", _source(rows, file)])


def group_of(kernel: dict[str, Any], least_ms: float) -> str:
    """The kind of a kernel: a product that is over sooner than the base's smallest can be is LoRA's.

    Args:
        least_ms: of that product, at the card's full speed.
    """
    name = kernel["kernel"]
    for group, pattern in GROUPS.items():
        if pattern and re.search(pattern, name):
            return group
    if re.search(PRODUCT, name):
        return BASE if kernel["ms"] / kernel["calls"] >= least_ms else "products of LoRA"
    return list(GROUPS)[-1]


def _column(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by kind, of all kernels, and of the whole step."""
    num_rows, tokens, memory = _case(row)
    tokens *= num_rows
    card, found = CARDS[row["card"]], dict.fromkeys(GROUPS, 0.0)
    smallest = OPERATIONS * min(SEVEN.q_size, SEVEN.intermediate_size) * SEVEN.hidden_size
    for kernel in row["kernels"]:
        found[group_of(kernel, multiplying_ms(tokens * smallest, card))] += kernel["ms"]
    listed = sum(found.values())
    found[FULL_SPEED] = multiplying_ms(tokens * (base_flop(SEVEN, memory) - _left_out(memory)), card)
    return found | {
        "kernels too short to be listed": row["kernels_ms"] - listed,
        "all kernels": row["kernels_ms"],
        "the whole step": row["step_ms"],
    }


def _left_out(memory: Memory) -> int:
    """Operations a token of what `lean` need not compute again: nothing in a block reads what its down_proj adds."""
    down = SEVEN.num_layers * SEVEN.intermediate_size * SEVEN.hidden_size
    return OPERATIONS * down if memory is Memory.lean else 0


def _case(row: dict[str, Any]) -> tuple[int, int, Memory]:
    """Rows, tokens of each and level of a case such as "8 x 256 tokens, trainer.memory=fast, ..."."""
    found = re.match(r"(?:(\d+) x )?(\d+) tokens, trainer\.memory=(\w+)", row["case"])
    if found is None:
        raise ValueError(f"case {row['case']!r} does not begin with '2048 tokens, trainer.memory=fast' or the like")
    return int(found[1] or 1), int(found[2]), Memory(found[3])


def _source(rows: list[dict[str, Any]], file: Path) -> str:
    cards = " and ".join(sorted({row["card"] for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    versions = sorted({row.get("torch") or row["versions"]["torch"] for row in rows})
    rows_of = f"One step of the fast engine on {cards}, torch {', '.join(versions)}, commit {commits}"
    return (
        f"{rows_of}. Full speed: {CARDS[rows[0]['card']].tflops:g} TFLOP/s. Kernels are told apart by their names, "
        f"products by their times: benchmarks/results/{file.name}, by `python -m benchmarks.step_profile BASE`."
    )
