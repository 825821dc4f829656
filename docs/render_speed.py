"""The tables of speed that docs/render.py writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.floor import row_floor_ms
from llama_lab.choices import Memory

ROOT = Path(__file__).resolve().parent.parent
SPEED = ROOT / "benchmarks" / "results" / "speed.json"
SPEED_H200 = SPEED.with_name("speed_h200.json")
SPEED_CPU = ROOT / "benchmarks" / "results" / "speed_cpu.json"


def at_commit(row: dict[str, Any]) -> str:
    """The commit that was measured, where it was recorded."""
    return f", at commit {row['commit']}" if "commit" in row else ""


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
    source += f"; {versions}{at_commit(rows[0])}: benchmarks/results/speed_cpu.json, by `{rows[0]['command']}`"
    return "\n".join([*lines, "", f"{source}."])


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a case is to reach."""

    tokens_per_s: float | None = None
    peak_gib: float | None = None
    times_floor: float | None = None
    """Its step in times of the least of its products and of dequantising the base forward and backward."""
    times_trl: float | None = None
    times_unsloth: float | None = None

    def said(self) -> str:
        """All of it."""
        parts = [f"{self.tokens_per_s:,.0f} tokens/s"] if self.tokens_per_s else []
        parts += [f"{self.peak_gib} GiB"] if self.peak_gib else []
        parts += [f"{times:g}x {name}" for name, times in self._times().items()]
        return ", ".join(parts)

    def _times(self) -> dict[str, float]:
        named = {"floor with dequantising": self.times_floor, "TRL": self.times_trl, "Unsloth": self.times_unsloth}
        return {name: times for name, times in named.items() if times}

    def missed(self, row: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[str]:
        """What of it the row does not reach, beside what it does.

        Args:
            peers: rows of the same case, by their systems.
        """
        found = []
        if self.tokens_per_s and row["tokens_per_s"] < self.tokens_per_s:
            found.append(f"{row['tokens_per_s']:,.0f} of {self.tokens_per_s:,.0f} tokens/s")
        if self.peak_gib and row["peak_memory_gib"] > self.peak_gib:
            found.append(f"{row['peak_memory_gib']:.2f} instead of {self.peak_gib} GiB")
        least = row_floor_ms(row, Memory.balanced) if self.times_floor else None
        if self.times_floor and least and row["step_ms"] > self.times_floor * least:
            found.append(f"{row['step_ms'] / least:.2f} instead of {self.times_floor:g} times the floor")
        for name, times in {"TRL": self.times_trl, "Unsloth": self.times_unsloth}.items():
            peer = peers.get(name.lower())
            if times and peer and row["tokens_per_s"] < times * peer["tokens_per_s"]:
                ratio = row["tokens_per_s"] / peer["tokens_per_s"]
                found.append(f"{ratio:.2f} instead of {times:g} times {name}{_needed(row, times / ratio)}")
        return found


def _needed(row: dict[str, Any], times_faster: float) -> str:
    """How long a step would be that is so much faster, beside what the card needs for its products."""
    floor = row_floor_ms(row)
    step = f", a step of {row['step_ms'] / times_faster:.0f} ms"
    return f"{step} of which the base's products need {floor:.0f} at the card's full speed" if floor else step


SPEED_TARGETS = {
    "256": Target(tokens_per_s=8000, times_trl=15, times_unsloth=15),
    "1024": Target(tokens_per_s=15000, times_trl=7, times_unsloth=4),
    "2048": Target(tokens_per_s=17000, times_trl=6, times_unsloth=2.6, times_floor=1.6),
    "8192": Target(tokens_per_s=17000, times_trl=4.5, times_unsloth=2),
    "1024, lean": Target(tokens_per_s=9500, peak_gib=5.0),
    "2048, lean": Target(tokens_per_s=10500, peak_gib=5.8),
    "8192, lean": Target(tokens_per_s=11000, peak_gib=9),
    "1024, lean, q and v": Target(peak_gib=4.5),
}
ELSEWHERE = ", on another H100"
"""What the system ends with of what was measured in another machine than the rows of the table."""
NAMES = {"trl": "TRL", "unsloth": "Unsloth"}
FIRST_STEP_S = 25
"""From the command to the first step with a warm compile cache, at most."""


def speed_table(file: Path = SPEED, *, is_short: bool = False) -> str:
    """Our runs on a GPU beside the peers', the least time of their products, and what was aimed at.

    Args:
        is_short: leave out how the peers were set up, what they reach elsewhere, and the first step.
    """
    rows = json.loads(file.read_text())["rows"]
    by_case = {(row["system"], row["case"]): row for row in rows}
    lines = [
        "| tokens a step | trainer.memory | tokens/s | ms a step | x floor | peak GiB | aimed at | TRL | Unsloth |"
    ]
    lines.append("|---:|---|---:|---:|---:|---:|---|---:|---:|")
    ours = [row for row in rows if row["system"] == "llama_lab" and row["case"] in SPEED_TARGETS]
    missed = []
    for row in ours:
        times, target = times_floor(row), SPEED_TARGETS[row["case"]]
        kind = _kind(row)
        others = {name: by_case[name, row["case"]] for name in ("trl", "unsloth") if (name, row["case"]) in by_case}
        peers = [_peer(row, others.get(name)) for name in ("trl", "unsloth")]
        speed = f"{row['tokens_per_s']:,.0f} | {row['step_ms']:.0f} | {f'{times:.2f}' if times else '-'}"
        beside = f"{row['peak_memory_gib']:.1f} | {target.said()} | {' | '.join(peers)}"
        lines.append(f"| {row['tokens_per_step']:,.0f} | {kind} | {speed} | {beside} |")
        missed += _missed(row, others)
    said = [f"Missed: {'; '.join(missed)}." if missed else "All aims of this table are reached."]
    if not is_short:
        said += [*_again(by_case), *_peers_said(rows), *_elsewhere(ours, by_case), *_first_steps(rows)]
    return "\n".join([*lines, "", "\n\n".join([*said, _source(rows, ours, file)])])


def _missed(row: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[str]:
    """What a row misses of its aims, in one entry; none where it reaches all."""
    found = SPEED_TARGETS[row["case"]].missed(row, peers)
    return [f"{row['tokens_per_step']:,.0f} tokens with {_kind(row)} ({', '.join(found)})"] if found else []


def _kind(row: dict[str, Any]) -> str:
    """Its trainer.memory, and what else tells it from rows of as many tokens."""
    level = next(word.split("=")[1] for word in row["settings"] if word.startswith("trainer.memory"))
    return f"`{level}`" + (", q and v, r=8" if "q and v" in row["case"] else "")


def _again(by_case: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Our rows again on another such card, and what of the aims they miss there; none where none was measured."""
    rows = [by_case[key] for case in SPEED_TARGETS if (key := (f"llama_lab{ELSEWHERE}", case)) in by_case]
    if not rows:
        return []
    cells = [f"{row['tokens_per_s']:,.0f} at {row['tokens_per_step']:,.0f} with {_kind(row)}" for row in rows]
    missed = [said for row in rows for said in _missed(row, {})]
    there = f"Missed there: {'; '.join(missed)}" if missed else "What is aimed at without a peer is reached there, too"
    said = f"Ours again{ELSEWHERE}, without peers beside them, at {_commits(rows)}: {'; '.join(cells)} tokens/s"
    return [f"{said}. {there}."]


def _peers_said(rows: list[dict[str, Any]]) -> list[str]:
    """How the peers of the table were set up, and what is to be known of their rows; none where none was measured."""
    found = []
    for name, called in NAMES.items():
        peers = [row for row in rows if row["system"] == name and "settings" in row]
        found += [f"{called}, {row['case']}: {' '.join(row['settings'])}{_note(row)}" for row in peers]
    said = "The peers' rows are not packed, if not said so, and their base is quantised once"
    return [f"{said} (`benchmarks/peer.py` explains the settings). {'; '.join(found)}."] if found else []


def _note(row: dict[str, Any]) -> str:
    return f" ({row['note'].rstrip('.')})" if "note" in row else ""


def _elsewhere(ours: list[dict[str, Any]], by_case: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The most that peers reached on other machines with such a card, and ours in times of it; none if none looked."""
    found = []
    for name in ("trl", "unsloth"):
        theirs = [(row, by_case.get((f"{name}{ELSEWHERE}", row["case"]))) for row in ours]
        cells = [f"{_peer(row, peer)} at {row['tokens_per_step']:,.0f}" for row, peer in theirs if peer]
        found += [f"{NAMES[name]} {', '.join(cells)}"] if cells else []
    if not found:
        return []
    why = "The peers' steps wait for the machine beside the card"
    return [f"{why}: the most they reached on H100s of other machines is {'; '.join(found)}."]


def times_floor(row: dict[str, Any]) -> float | None:
    """A step in times of the least that its products can take; None for a card whose speed is not known."""
    least = row_floor_ms(row)
    return row["step_ms"] / least if least else None


def _first_steps(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence about the seconds from the command to its first step; none where that was not measured."""
    cases = {row["case"].rsplit(" ", 1)[1]: row for row in rows if "until_first_step_s" in row}
    found = {cache: row["until_first_step_s"] for cache, row in cases.items()}
    if not found:
        return []
    names = {"cold": "an empty compile cache", "warm": "a warm one" if "cold" in found else "a warm compile cache"}
    parts = [f"{found[cache]:.1f} s with {name}" for cache, name in names.items() if cache in found]
    said = f"From the command to its first step: {' and '.join(parts)}"
    if len(found) == 2:
        apart = found["cold"] - found["warm"]
        said += f", compiling included; the {apart:.1f} s between them are compiling, and files read for the first time"
    aim = f"at most {FIRST_STEP_S} s with a warm one are aimed at"
    notes = sorted({f" {row['note']}; at commit {row['commit']}." for row in cases.values() if "note" in row})
    return [f"{said} ({aim}{'' if 'warm' in found else ', which was not measured'}).{''.join(notes)}"]


def _source(rows: list[dict[str, Any]], ours: list[dict[str, Any]], file: Path) -> str:
    """Card, versions, commits and file."""
    versions = ", ".join(f"{name} {rows[0]['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    versions_of = next((row["versions"] for row in rows if row["system"] == "unsloth"), None)
    unsloth = f"; Unsloth {versions_of['unsloth']}, with trl {versions_of['trl']}" if versions_of else ""
    source = f"A Llama-2-7B-shaped model, NF4, on one {rows[0]['card']}; {versions}{unsloth}"
    where = f"benchmarks/results/{file.name}, by `benchmarks/speed_gpu.py`"
    floor = "The floor is what its products take at the card's full speed, and dequantising (`benchmarks/floor.py`)"
    notes = sorted({row["note"] for row in ours if "note" in row})
    return " ".join([f"{source}. Ours at {_commits(ours)}: {where}. {floor}.", *notes])


def _commits(ours: list[dict[str, Any]]) -> str:
    """The commit of most of our rows, and of which cases others are."""
    by_commit: dict[str, list[str]] = {}
    for row in ours:
        by_commit.setdefault(row.get("commit", "not recorded"), []).append(row["case"])
    (most, _), *others = sorted(by_commit.items(), key=lambda item: -len(item[1]))
    said = "".join(f'; "{"; ".join(cases)}" at {commit}' for commit, cases in others)
    return f"commit {most}{said}"


def _peer(ours: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """The peer's speed, and ours in times of it."""
    if peer is None:
        return "not measured" if "lean" not in ours["case"] else "-"
    return f"{peer['tokens_per_s']:,.0f} ({ours['tokens_per_s'] / peer['tokens_per_s']:.1f}x)"
