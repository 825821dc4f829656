"""The table of stacks that docs/render.py writes."""

import json
import math
import re
from typing import Any

from render_speed import at_commit
from render_sweep import ROOT, SWEEP

STACKED = ROOT / "benchmarks" / "results" / "stacked.json"
RUNS = STACKED.with_name("stacked_runs.json")


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
    lines += [_stacked_line(row, [r for r in rows if _work(r) == _work(row)], others) for row in stacks]
    said = f"Aimed at: {'; '.join(_stack_aim(row, rows) for row in stacks if row['case'] in STACK_TARGETS)}."
    said += _most_gained(stacks, rows)
    first = stacks[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    source = f"A Llama-2-7B-shaped model, NF4, on one {first['card']}, {_commits(rows)}; {versions}"
    source = f"{source}: benchmarks/results/stacked.json, by `{first['command']}`."
    return "\n".join(["", *lines, "", said, "", source, ""])


def _commits(rows: list[dict[str, Any]]) -> str:
    """The commit of the first stack, and of what was measured at another."""
    own = next(row["commit"] for row in rows if row["system"] == "stack")
    others: dict[str, list[str]] = {}
    for row in rows:
        if row.get("commit", "not recorded") != own:
            others.setdefault(row.get("commit", "not recorded"), []).append(f"{_work(row)}, {row['system']}")
    said = "".join(f"; at {commit}: {'; '.join(cases)}" for commit, cases in others.items())
    return f"at commit {own}{said}"


def _most_gained(stacks: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """What one run with as many tokens as a stack has would gain; nothing where that was not measured."""
    if not SWEEP.exists():
        return ""
    runs = {row["case"]: row for row in json.loads(SWEEP.read_text())["rows"]}
    found = []
    for stack in stacks:
        run = runs.get(LIKE_STACKS.get(stack["case"], ""))
        if not run or run["card"] != stack["card"]:
            continue
        if abs(stack["tokens_per_step"] / run["tokens_per_step"] - 1) < 0.1:
            alone = next(r for r in rows if (r["system"], r["case"]) == ("one after the other", stack["case"]))
            gain = run["tokens_per_s"] / alone["tokens_per_s"]
            rank = next(word.partition("=")[2] for word in run["settings"] if word.startswith("lora.r="))
            run_is = f"{run['tokens_per_s']:,.0f} tokens/s at rank {rank}{at_commit(run)}"
            found.append(f"{_work(stack)} {run_is}, {gain:.2f} times one by one")
    return f" No stack is expected to be faster than one run of as many tokens: {'; '.join(found)}." if found else ""


LIKE_STACKS = {"8 x 256, fast": "rank 32", "8 x 512, fast": "tokens 4096", "8 x 1024, fast": "tokens 8192"}
"""The cases of the sweep over tokens and ranks that have as many tokens as a stack."""
STACK_TARGETS = {
    "8 x 256, fast": (1.9, 25, 15000),
    "8 x 512, fast": (1.4, 12, 16000),
    "8 x 1024, fast": (1.1, 7, 16500),
}
"""Times our own engine one by one, times TRL one by one, and tokens/s of all rows, at least."""


def _stack_aim(stack: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What was aimed at in one case, and what of it is missed."""
    speed = {row["system"]: row["tokens_per_s"] for row in rows if row["case"] == stack["case"]}
    names = ("times one by one", "times TRL", "tokens/s")
    reached = (
        speed["stack"] / speed["one after the other"],
        speed["stack"] / speed.get("trl, one by one", math.inf),
        speed["stack"],
    )
    aims = list(zip(names, STACK_TARGETS[stack["case"]], reached, strict=True))
    missed = [f"{found:.2f} {name}" for name, aim, found in aims if found < aim]
    said = ", ".join(f"{aim:,} {name}" for name, aim, _ in aims)
    return f"{stack['case'].removesuffix(', fast')}: {said} ({'missed: ' + ', '.join(missed) if missed else 'reached'})"


STACKED_PEERS = {"trl, one by one": "TRL one by one, tokens/s", "side by side": "processes side by side, tokens/s"}
"""How the systems are called in the results, and their columns."""


def _work(row: dict[str, Any]) -> str:
    """Rows and tokens of a case, without its trainer.memory."""
    return str(row["case"]).partition(",")[0]


def _stacked_line(stack: dict[str, Any], same: list[dict[str, Any]], others: list[str]) -> str:
    """A stack, and what else has been measured of its case."""
    alone = next(row for row in same if (row["system"], row["case"]) == ("one after the other", stack["case"]))
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
    unlike = f", on {other['card']}" if other["card"] != stack["card"] else ""
    unlike += f", `{other['memory']}`" if other.get("memory", stack["memory"]) != stack["memory"] else ""
    return f"{some}{other['tokens_per_s']:,.0f} ({stack['tokens_per_s'] / other['tokens_per_s']:.1f}x{unlike})"


def stacked_runs_table() -> str:
    """Whole runs one after the other beside one command that stacks them; nothing where it has not been measured."""
    if not RUNS.exists():
        return ""
    rows = json.loads(RUNS.read_text())["rows"]
    stacks = [row for row in rows if row["system"] == "one stacked command"]
    lines = ["| runs x tokens a step of each | one by one, s | one stacked command, s | times as fast |"]
    lines += ["|---|---:|---:|---:|"]
    for stack in stacks:
        alone = next(r for r in rows if r["case"] == stack["case"] and r is not stack)
        gain = f"{alone['makespan_s'] / stack['makespan_s']:.2f}x"
        lines.append(f"| {stack['case']} | {alone['makespan_s']:.0f} | {stack['makespan_s']:.0f} | {gain} |")
    first = stacks[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    source = f"A Llama-2-7B-shaped model, NF4, on one {first['card']}{at_commit(first)}; {versions}"
    source = f"{source}: benchmarks/results/stacked_runs.json, by `{first['command']}`."
    return "\n".join([*lines, "", source])
