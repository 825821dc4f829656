"""How long llama_lab takes to say something before any work: beside a bare Hydra app with as many config groups.

    python -m benchmarks.startup --runs 10            # prints one JSON line a case and system
    python -m benchmarks.startup --runs 10 --write    # and writes benchmarks/results/startup.json

The two systems take turns, so that another load on the machine slows both alike. cpu_ms is the processor time of the
process and its children; it is steadier than wall time where other work runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, environment, facts

RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
TARGET_RATIO = 1.3

BARE_APP = """\
import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print(cfg)


if __name__ == "__main__":
    main()
"""

CASES = {"help": (["--help"], 0), "cfg_job": (["--cfg", "job"], 0), "config_error": (["lora.rr=8"], None)}
"""Words, and the exit code that llama_lab and the bare app share; None: 2 and 1, as each of them reports an error."""


@dataclass(kw_only=True)
class System:
    """One program to start."""

    name: str
    command: list[str]
    error_code: int
    wall_ms: dict[str, list[float]] = field(default_factory=lambda: {case: [] for case in CASES})
    cpu_ms: dict[str, list[float]] = field(default_factory=lambda: {case: [] for case in CASES})


def groups() -> list[str]:
    """The config groups of llama_lab; the bare app gets as many."""
    return sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")


def write_bare_app(folder: Path) -> Path:
    """A Hydra app with one small YAML a group; returns its script."""
    for group in groups():
        (folder / "conf" / group).mkdir(parents=True)
        (folder / "conf" / group / "default.yaml").write_text("name: default\nr: 8\n")
    defaults = ["defaults:", "  - _self_", *(f"  - {group}: default" for group in groups())]
    (folder / "conf" / "config.yaml").write_text("\n".join([*defaults, "seed: 0"]) + "\n")
    (folder / "app.py").write_text(BARE_APP)
    return folder / "app.py"


def measure(system: System, case: str, folder: Path) -> None:
    """Start `system` once and note how long it took.

    Raises:
        RuntimeError: it ended with another exit code than this case has.
    """
    words, code = CASES[case]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*system.command, *words], cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != (system.error_code if code is None else code):
        raise RuntimeError(f"{system.name} {words} ended with {done.returncode}: {done.stderr.decode()}")
    system.wall_ms[case].append(1000 * wall)
    system.cpu_ms[case].append(1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


def rows(systems: list[System]) -> list[dict[str, Any]]:
    """One result a case and system; the last system is what the others are compared with."""
    found = []
    for case, (words, _) in CASES.items():
        for system in systems:
            wall, cpu = system.wall_ms[case], system.cpu_ms[case]
            found.append(
                {
                    "case": case,
                    "system": system.name,
                    "command": " ".join([*system.command[1:], *words]),
                    "runs": len(wall),
                    "median_ms": round(statistics.median(wall), 1),
                    "min_ms": round(min(wall), 1),
                    "cpu_ms": round(statistics.median(cpu), 1),
                    "ratio_to_bare": _ratio(wall, systems[-1].wall_ms[case]),
                    "cpu_ratio_to_bare": _ratio(cpu, systems[-1].cpu_ms[case]),
                }
                | facts("hydra-core", "omegaconf")
            )
    return found


def main() -> None:
    """Measure, print one JSON line a row, and keep them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="starts of each system in each case (default: 10)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        systems = [
            System(name="llama_lab", command=[sys.executable, "-m", "llama_lab"], error_code=2),
            System(name="bare hydra", command=[sys.executable, write_bare_app(folder).name], error_code=1),
        ]
        for number in range(-1, args.runs):
            for case in CASES:
                for system in systems:
                    measure(system, case, folder)
                    if number < 0:  # the first start writes byte code and fills the page cache
                        system.wall_ms[case].clear()
                        system.cpu_ms[case].clear()
    found = rows(systems)
    for row in found:
        print(json.dumps(row))
    if args.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({"schema": 1, "target_ratio": TARGET_RATIO, "rows": found}, indent=2) + "\n")


def _ratio(ours: list[float], bare: list[float]) -> float:
    return round(statistics.median(ours) / statistics.median(bare), 2)


if __name__ == "__main__":
    main()
