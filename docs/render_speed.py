"""The tables of speed that docs/render.py writes."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPEED = ROOT / "benchmarks" / "results" / "speed.json"
SPEED_H200 = SPEED.with_name("speed_h200.json")
LEARNING = SPEED.with_name("learning.json")
SPEED_CPU = ROOT / "benchmarks" / "results" / "speed_cpu.json"
STACKED = SPEED.with_name("stacked.json")


def speed_cpu_table() -> str:
    """Both engines on the embedded default."""
    rows = json.loads(SPEED_CPU.read_text())["rows"]
    lines = ["| system | tokens/s | ms a step | against TRL alone |", "|---|---:|---:|---:|"]
    for row in rows:
        name = {"llama_lab": "`fast`", "trl": "`standard`"}[row["system"]]
        lines.append(f"| {name} | {row['tokens_per_s']:.0f} | {row['step_ms']:.0f} | {row['against_trl']:.2f} |")
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    card, runs = rows[0]["card"].removeprefix("none; "), len(rows[0]["runs_tokens_per_s"])
    source = f"The embedded default, {rows[0]['tokens_per_step']:.0f} tokens a step, {card}, median of {runs} runs each"
    return "\n".join(
        [*lines, "", f"{source}; {versions}: benchmarks/results/speed_cpu.json, by `{rows[0]['command']}`."]
    )


def speed_table(file: Path = SPEED) -> str:
    """Our runs on a GPU beside the peers', and beside what was aimed at."""
    rows = json.loads(file.read_text())["rows"]
    by_case = {(row["system"], row["case"]): row for row in rows}
    lines = ["| tokens a step | trainer.memory | tokens/s | ms a step | peak GiB | aimed at | TRL | Unsloth |"]
    lines.append("|---:|---|---:|---:|---:|---|---:|---:|")
    for row in (row for row in rows if row["system"] == "llama_lab" and row["case"] in SPEED_TARGETS):
        level = next(word.split("=")[1] for word in row["settings"] if word.startswith("trainer.memory"))
        kind = ", q and v, r=8" if "q and v" in row["case"] else ""
        peers = [_peer(row, by_case.get((name, row["case"]))) for name in ("trl", "unsloth")]
        lines.append(
            f"| {row['tokens_per_step']:,.0f} | `{level}`{kind} | {row['tokens_per_s']:,.0f} | {row['step_ms']:.0f} | "
            f"{row['peak_memory_gib']:.1f} | {SPEED_TARGETS[row['case']]} | {' | '.join(peers)} |"
        )
    versions = ", ".join(f"{name} {rows[0]['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    unsloth = next(row["versions"]["unsloth"] for row in rows if row["system"] == "unsloth")
    source = f"A Llama-2-7B-shaped model, NF4, on one {rows[0]['card']}; {versions}; Unsloth {unsloth}"
    where = f"benchmarks/results/{file.name}, by `benchmarks/speed_gpu.py`"
    return "\n".join([*lines, "", f"{source}. Ours at {_commits(rows)}: {where}."])


def _commits(rows: list[dict[str, Any]]) -> str:
    """The commit of most of our rows, and of which cases others are."""
    ours = [row for row in rows if row["system"] == "llama_lab" and row["case"] in SPEED_TARGETS]
    by_commit: dict[str, list[str]] = {}
    for row in ours:
        by_commit.setdefault(row["commit"], []).append(row["case"])
    (most, _), *others = sorted(by_commit.items(), key=lambda item: -len(item[1]))
    said = "".join(f'; "{"; ".join(cases)}" at {commit}' for commit, cases in others)
    return f"commit {most}{said}"


def learning_table() -> str:
    """Both engines on the same rows with the same seed."""
    fast, standard = json.loads(LEARNING.read_text())["rows"]
    num = min(len(fast["losses"]), len(standard["losses"]))
    lines = ["| mean training loss of steps | fast | standard |", "|---|---:|---:|"]
    edges = [0, 5, 10, 20, 40, 80, num]
    for start, end in itertools.pairwise(edges):
        numbers = [sum(row["losses"][start:end]) / (end - start) for row in (fast, standard)]
        lines.append(f"| {start + 1} to {end} | {numbers[0]:.4f} | {numbers[1]:.4f} |")
    source = f"The embedded default on {fast['card']}, seed 0, commit {fast['commit']}"
    return "\n".join([*lines, "", f"{source}: benchmarks/results/learning.json, by `python -m benchmarks.learning`."])


SPEED_TARGETS = {
    "256": "8,000 tokens/s",
    "1024": "15,000 tokens/s",
    "2048": "17,000 tokens/s",
    "8192": "17,000 tokens/s",
    "1024, lean": "9,500 tokens/s, 5.0 GiB",
    "2048, lean": "10,500 tokens/s, 5.8 GiB",
    "8192, lean": "11,000 tokens/s, 9 GiB",
    "1024, lean, q and v": "4.5 GiB",
}
"""What each case was to reach."""


def _peer(ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """The peer's speed, and ours in times of it."""
    if peer is None:
        return "not measured" if "lean" not in ours["case"] else "-"
    return f"{peer['tokens_per_s']:,.0f} ({ours['tokens_per_s'] / peer['tokens_per_s']:.1f}x)"


def stacked_table() -> str:
    """Stacks on a GPU beside the same runs one after the other; nothing where it has not been measured."""
    if not STACKED.exists():
        return ""
    rows = json.loads(STACKED.read_text())["rows"]
    others = [kind for kind in STACKED_PEERS if any(kind in row["system"] for row in rows)]
    head = ["points x tokens of each", "ranks", "one by one, tokens/s", "together, tokens/s", "gain", "peak GiB"]
    head += [STACKED_PEERS[kind] for kind in others]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|" + "---:|" * len(others)]
    stacks = [row for row in rows if row["system"] == "stack"]
    lines += [_stacked_line(row, [r for r in rows if r["case"] == row["case"]], others) for row in stacks]
    first = stacks[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    at = f", at commit {first['commit']}" if "commit" in first else ""
    source = f"A Llama-2-7B-shaped model, NF4, on one {first['card']}{at}; {versions}"
    return "\n".join(["", *lines, "", f"{source}: benchmarks/results/stacked.json, by `{first['command']}`.", ""])


STACKED_PEERS = {"trl, one by one": "TRL one by one, tokens/s", "side by side": "processes side by side, tokens/s"}
"""How the systems are called in the results, and their columns."""


def _stacked_line(stack: dict[str, Any], same: list[dict[str, Any]], others: list[str]) -> str:
    """A stack, and what else has been measured of its case."""
    alone = next(row for row in same if row["system"] == "one after the other")
    ranks = ", ".join(str(rank) for rank in sorted(set(stack["ranks"])))
    gain = f"{stack['tokens_per_s'] / alone['tokens_per_s']:.2f}x"
    cells = [stack["case"], ranks, f"{alone['tokens_per_s']:,.0f}", f"{stack['tokens_per_s']:,.0f}", gain]
    cells.append(f"{stack['peak_memory_gib']:.1f}")
    for kind in others:
        other = next((row for row in same if kind in row["system"]), None)
        cells.append(_beside(stack, other) if other else "not measured")
    return f"| {' | '.join(cells)} |"


def _beside(stack: dict[str, Any], other: dict[str, Any]) -> str:
    """The other's speed, and the stack's in times of it; of processes, how many of them ran through."""
    found, wanted = re.match(r"(?:(\d+) of (\d+) )?", other["system"]).groups()  # type: ignore[union-attr]
    some = f"{found} of {wanted} ran: " if found != wanted else ""
    card = f", on {other['card']}" if other["card"] != stack["card"] else ""
    return f"{some}{other['tokens_per_s']:,.0f} ({stack['tokens_per_s'] / other['tokens_per_s']:.1f}x{card})"
