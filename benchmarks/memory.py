"""Peak memory of training a Llama-2-7B-shaped model, measured on a GPU beside the prediction of llama_lab.memory.

    python -m benchmarks.memory --write          # every case: one JSON line each, and benchmarks/results/memory.json
    python -m benchmarks.memory --cpu --write    # SmolLM2 on the CPU, by resident memory; kept in the same file
    python -m benchmarks.memory --check          # predict the kept cases again: exit code 1 if one is off by over 10%

The weights are random, since memory depends on shapes. A case goes through a run's own code (model.load_base,
lora.add_adapter, trainer.fit) with rows of random tokens. Cases of one base share a process, in which the adapter is
taken off between them; what is still held then is part of the result (left_over_gib).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.machine import commit
from llama_lab.activations import Device
from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.lock import cpu_name
from llama_lab.memory import estimate
from llama_lab.params import shape_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
TARGET_ERROR = 0.1
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting that is measured."""

    words: tuple[str, ...]
    mixed: bool = False
    """Every second row is half as long, so that batches are padded; else all rows have exactly the length."""
    on_gpu: bool = True

    @property
    def config(self) -> RunConfig:
        return compose_words(list(self.words))

    @property
    def base(self) -> str:
        """Cases that agree in this share a base; on a CPU only a fresh process shows its own peak."""
        if not self.on_gpu:
            return " ".join(self.words)
        return " ".join(word for word in self.words if word.startswith(("quant", "model")))

    def prediction(self) -> dict[str, Any]:
        """predicted_gib and its parts."""
        config = self.config
        shape = shape_of(config.model)
        assert shape is not None
        device = Device.gpu if self.on_gpu else Device.cpu
        found = estimate(shape, config, length=config.dataset.max_length, device=device, padded=self.mixed)
        parts = {name: round(gib, 4) for name, gib in found.parts().items()}
        return {"predicted_gib": round(found.total, 4), "predicted_parts_gib": parts}


def case(quant: str, lora: str, batch: int, length: int, *more: str, mixed: bool = False, cpu: bool = False) -> Case:
    """A case by what differs; what is not named is stated, so that a new default does not change an old result."""
    optim = () if any(word.startswith("trainer.optim") for word in more) else ("trainer.optim=adamw_torch_fused",)
    words = (
        f"model={'smollm2_135m' if cpu else 'llama2_7b'}",
        f"quant={quant}",
        f"lora={lora}",
        f"trainer.per_device_train_batch_size={batch}",
        f"dataset.max_length={length}",
    )
    engine = () if cpu else ("trainer.engine=standard",)
    return Case(words=(*words, *engine, *optim, *more), mixed=mixed, on_gpu=not cpu)


CHECKPOINTING, PAGED = "trainer.gradient_checkpointing=true", "trainer.optim=paged_adamw_32bit"
CASES = [
    case("nf4", "all_linear", 4, 1024, CHECKPOINTING, PAGED),
    case("nf4", "all_linear", 1, 2048),
    case("nf4", "attention", 4, 512, PAGED),
    case("nf4", "all_linear", 4, 512, "lora.r=64"),
    case("nf4", "all_linear", 2, 1024, "lora.dropout=0.05", "trainer.gradient_accumulation_steps=2", PAGED),
    case("nf4", "all_linear", 8, 256, "lora.r=8"),
    case("nf4", "attention", 4, 2048, CHECKPOINTING),
    case("nf4", "all_linear", 1, 256, CHECKPOINTING, "lora.r=256", "trainer.optim=adamw_torch"),
    case("nf4", "all_linear", 4, 1024, mixed=True),
    case("nf4", "dora", 1, 512),
    case("nf4", "dora", 2, 1024, CHECKPOINTING),
    case("none", "all_linear", 1, 512),
    case("none", "attention", 4, 256),
    case("none", "all_linear", 2, 1024, "lora.dropout=0.05"),
    case("none", "all_linear", 2, 2048, CHECKPOINTING),
    case("int8", "all_linear", 2, 512),
    case("int8", "attention", 1, 1024),
    case("int8", "all_linear", 4, 1024, CHECKPOINTING),
    case("fp4", "all_linear", 2, 512, "trainer.optim=paged_adamw_8bit"),
    case("fp4", "attention", 1, 2048, CHECKPOINTING),
    case("nf4", "all_linear", 1, 512, "quant.double_quant=false"),
    case("nf4", "attention", 2, 1024, "quant.double_quant=false", "trainer.optim=adamw_torch"),
    case("nf4", "all_linear", 1, 512, "quant.compute_dtype=float16"),
    case("nf4", "attention", 4, 512, CHECKPOINTING, "quant.compute_dtype=float16"),
]
CPU_CASES = [
    case("none", "all_linear", 2, 256, cpu=True),
    case("nf4", "all_linear", 4, 128, cpu=True),
    case("nf4", "attention", 2, 256, CHECKPOINTING, cpu=True),
    case("none", "all_linear", 1, 512, "lora.r=64", "lora.dropout=0.05", cpu=True),
]


def main() -> int:
    """Measure and predict, or check what is kept; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure SmolLM2 on the CPU")
    parser.add_argument("--write", action="store_true", help=f"keep the results in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--check", action="store_true", help="predict the kept cases again; nothing is measured")
    parser.add_argument("--group", metavar="BASE", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        return check(read_rows())
    cases = CPU_CASES if args.cpu else CASES
    if args.group:
        measure_group([case for case in cases if case.base == args.group], args.folder)
        return 0
    rows = list(measure_all(cases, args.cpu))
    if args.write:
        kept = [row for row in read_rows() if row["on_gpu"] == args.cpu]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        found = {"schema": 1, "target_error": TARGET_ERROR, "rows": kept + rows if args.cpu else rows + kept}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure_all(cases: list[Case], cpu: bool) -> Iterator[dict[str, Any]]:
    """One result a case; each base has a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        if not cpu:
            _run_python(
                f"from benchmarks import memory, peaks; peaks.make_base({str(folder)!r}, memory.CASES[0].config.model)"
            )
        for base, _ in groupby(cases, key=lambda case: case.base):
            words = ["-m", "benchmarks.memory", "--group", base, "--folder", str(folder), *(["--cpu"] if cpu else [])]
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"case"'):
                    print(line, end="", flush=True)
                    yield json.loads(line)
            if process.wait():
                print(f"{base} ended with {process.returncode}", file=sys.stderr)


def measure_group(cases: list[Case], folder: Path) -> None:
    """Measure the cases of one base in this process; prints one JSON line each."""
    from benchmarks.peaks import measure

    configs = []
    for one in cases:
        config = one.config
        if one.on_gpu:
            config = replace(config, model=replace(config.model, name=str(folder)))
        configs.append((config, one.mixed))
    for one, found in zip(cases, measure(configs, compose_words(["model=tiny"]).model), strict=True):
        predicted = one.prediction()
        row: dict[str, Any] = {"case": " ".join(one.words), "system": "llama_lab", "settings": list(one.words)}
        row |= {"mixed_lengths": one.mixed, "on_gpu": one.on_gpu} | found | predicted
        row["relative_error"] = round(predicted["predicted_gib"] / found["peak_memory_gib"] - 1, 4)
        print(json.dumps(row | _facts(one)), flush=True)


def check(rows: Iterable[dict[str, Any]]) -> int:
    """Predict each kept case again; 1 if one on a GPU is off by more than TARGET_ERROR."""
    wrong = 0
    for row in rows:
        error = error_of(row)
        print(f"{error:+7.1%}  {row['peak_memory_gib']:7.2f} GiB  {row['case']}")
        wrong += row["on_gpu"] and abs(error) > TARGET_ERROR
    print(f"{wrong} of the cases on a GPU are off by more than {TARGET_ERROR:.0%}")
    return int(wrong > 0)


def error_of(row: dict[str, Any]) -> float:
    """Today's prediction of a kept case, relative to what was measured."""
    one = Case(words=tuple(row["settings"]), mixed=row["mixed_lengths"], on_gpu=row["on_gpu"])
    return one.prediction()["predicted_gib"] / row["peak_memory_gib"] - 1


def read_rows() -> list[dict[str, Any]]:
    """The kept results."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def _run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _facts(one: Case) -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_name() if one.on_gpu and torch.cuda.is_available() else cpu_name()
    return {
        "card": card,
        "command": f"python -m benchmarks.memory{'' if one.on_gpu else ' --cpu'} --write",
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        **commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
