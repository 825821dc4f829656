"""`repro`: a run once more from its run.json, and whether it came out the same."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lab import __version__
from llama_lab.checks import check_sources
from llama_lab.choices import Resume, Tracker
from llama_lab.config import RunConfig
from llama_lab.errors import LlamaLabError, RunError, no_folder
from llama_lab.hub import at_commit
from llama_lab.lock import below, code_state, config_of, flat, hardware, package_versions
from llama_lab.process import prepare, quiet_libraries
from llama_lab.rundir import RunDir, check_run_folder
from llama_lab.same_base import fingerprint, recorded

MEASURED = ("runtime_s", "tokens_per_s", "peak_memory_gib")
"""Ends of the names of numbers that differ from run to run."""
OTHER_BITS = (
    "versions.",
    "hardware.cpu",
    "hardware.torch_threads",
    "hardware.gpus",
    "hardware.cuda",
    "hardware.platform",
)
"""What may change the last bits of a number though code and data are the same."""
Difference = tuple[str, Any, Any]


@dataclass(kw_only=True)
class ReproOptions:
    """What is asked for."""

    to: Path | None
    check: bool
    """Only say what differs."""
    patch: bool
    """Only print the uncommitted change of the run."""
    tolerance: float
    """Relative difference of a loss that counts as equal where processor or versions are others."""


def repro(path: Path, options: ReproOptions) -> int:
    """Do the run again; the exit code: 0 only where curve and result are equal.

    Raises:
        RunError: there is no run.json, the new folder is in use, or base or rows of the run are gone.
    """
    run_dir = RunDir(path.parent if path.is_file() and path.name == RunDir(path.parent).lock.name else path)
    if not run_dir.path.is_dir():
        raise RunError(f"{path}: {no_folder(path)} Type the folder of a run, or its run.json.")
    lock = run_dir.read_lock()
    if options.patch:
        print(below(lock, "code", "diff") or "", end="")
        return 0
    config = _pinned(config_of(lock), lock)
    to = options.to or run_dir.path.absolute().with_name(
        f"{run_dir.path.absolute().name}-again-{time.strftime('%H-%M-%S')}"
    )
    check_run_folder(to, Resume.never, "--to")
    try:
        check_sources(config)
    except LlamaLabError as error:
        raise RunError(f"{run_dir.path} cannot be done again until what it began with is back: {error}") from None
    _threads_of(lock)
    prepare(config)
    found = _differences(lock, config)
    _show_differences(found, lock, run_dir.path)
    if options.check:
        return 1 if found else 0
    if run_dir.result.exists():
        run_dir.read_result()  # one that is damaged is told before the run is done
    else:
        print(f"{run_dir.path} has no result to compare with; the run is done all the same.")
    _run(config, to, lock["overrides"])
    return _verdict(run_dir, RunDir(to), found, options.tolerance)


def _pinned(config: RunConfig, lock: dict[str, Any]) -> RunConfig:
    """The run's settings with what was found out when it ran: the commit of the model and the micro-batch."""
    model = at_commit(config.model, lock)
    trainer = replace(config.trainer, resume=Resume.never)
    if trainer.micro_batch_size == "auto" and "micro_batch_size" in lock:
        trainer = trainer.with_micro_batch(lock["micro_batch_size"])
    tracking = replace(config.tracking, backend=Tracker.none)  # a repetition is no new run of the project
    return replace(config, model=model, trainer=trainer, tracking=tracking, resume=None)


def _threads_of(lock: dict[str, Any]) -> None:
    """Compute with as many threads as the run: on a CPU their number changes the last bits."""
    threads = below(lock, "hardware", "torch_threads")
    if isinstance(threads, int) and threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def _differences(lock: dict[str, Any], config: RunConfig) -> list[Difference]:
    """What is not as it was: code, packages, data, model, hardware."""
    now: dict[str, Any] = {
        "code": code_state(),
        "versions": {"python": _python(), "llama_lab": __version__} | package_versions(),
        "hardware": hardware(),
        "model": {"fingerprint": fingerprint(config.model)} if recorded(lock) else {},
        "dataset": {"fingerprint": _fingerprint(config)},
    }
    found: list[Difference] = []
    for part, content in now.items():
        then = _flat(lock.get(part))
        here = _flat(content)
        keys = here.keys() if part in ("dataset", "model") else then.keys() | here.keys()
        found += [(f"{part}.{k}", then.get(k), here.get(k)) for k in sorted(keys) if then.get(k) != here.get(k)]
    return found


def _fingerprint(config: RunConfig) -> str:
    from llama_lab.data.splits import build_splits
    from llama_lab.model import load_tokenizer

    quiet_libraries(config)
    tokenizer, trainer = load_tokenizer(config.model), config.trainer.name
    return build_splits(config.dataset, tokenizer, seed=config.seed, trainer=trainer).fingerprint


def _flat(content: Any) -> dict[str, Any]:
    flattened = flat(content) if isinstance(content, dict) else {}
    change = flattened.get("diff")
    if isinstance(change, str) and change:
        flattened["diff"] = f"{len(change.splitlines())} lines ({hashlib.sha256(change.encode()).hexdigest()[:8]})"
    return flattened


def _show_differences(found: list[Difference], lock: dict[str, Any], path: Path) -> None:
    if not found:
        print("Code, packages, model, data and hardware are those of the run.")
        return
    print("Not as it was:")
    for name, then, now in found:
        print(f"  {name}: {then or 'nothing'} then, {now or 'nothing'} now")
    commit = below(lock, "code", "commit")
    if any(name.startswith("code.") for name, _, _ in found) and commit:
        told = f" && python -m llama_lab repro {shlex.quote(str(path))} --patch | git apply"
        patch = told if below(lock, "code", "diff") else ""
        print(f"The code of the run: git checkout {commit}{patch}")
    versions = _flat(lock.get("versions"))
    others = [n.partition(".")[2] for n, _, _ in found if n.startswith("versions.")]
    wanted = [
        f"{name}=={versions[name]}" for name in others if name in versions and name not in ("python", "llama_lab")
    ]
    if wanted:
        print(f"Its packages: python -m pip install {shlex.join(wanted)}")


def _run(config: RunConfig, to: Path, overrides: list[str]) -> None:
    import logging

    from llama_lab.app import run_in

    to.mkdir(parents=True, exist_ok=True)
    with _log_into(to / "llama_lab.log"):
        try:
            run_in(config, to, overrides)
        except Exception:
            logging.getLogger(__name__).exception("The run failed")
            raise


def _verdict(then: RunDir, now: RunDir, found: list[Difference], tolerance: float) -> int:
    """Compare curve, result and adapter; bit by bit unless processor or versions are others."""
    if not then.result.exists():
        print(f"Done: {now.path}. There is nothing to compare it with.")
        return 1
    changed = [name for name, _, _ in found if name.startswith(OTHER_BITS)]
    pairs = list(_numbers(then, now))
    off = [(name, a, b) for name, a, b in pairs if not _equal(a, b)]
    same_bytes = _digest(then) == _digest(now)
    if not off and same_bytes:
        print(f"The same, bit by bit: {len(pairs)} numbers and the adapter. {now.path}")
        return 0
    if not off and changed:
        print(f"The same numbers; the adapter differs in its last bits. {now.path}")
        return 0
    far = [(name, a, b) for name, a, b in off if not _equal(a, b, tolerance)]
    for name, a, b in (far or off)[:10]:
        print(f"  {name}: {a} then, {b} now")
    if far or not changed:
        allowed = f"within {tolerance:.0%}" if changed else "bit by bit: processor and versions are the same"
        print(f"Not the same: {len(far or off)} of {len(pairs)} numbers; they were to be equal {allowed}. {now.path}")
        return 1
    print(f"The same within {tolerance:.0%}: {len(pairs)} numbers, of which {len(off)} differ. {now.path}")
    return 0


def _numbers(then: RunDir, now: RunDir) -> Iterator[Difference]:
    """Every number of the curve and of the result that should come out again."""
    curve = _curve(now)
    for (step, name), value in _curve(then).items():
        yield f"step {step} {name}", value, curve.get((step, name))
    result = now.read_result()
    for name, value in then.read_result().items():
        if name not in ("schema", "error") and not name.endswith(MEASURED):
            yield name, value, result.get(name)


def _curve(run_dir: RunDir) -> dict[tuple[int, str], Any]:
    """The numbers of metrics.jsonl by step and name; a step may have several lines."""
    return {
        (row["step"], name): value
        for row in run_dir.read_metrics()
        for name, value in row.items()
        if name != "step" and not name.endswith(MEASURED)
    }


def _equal(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float) and tolerance:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * 0.01)
    return bool(a == b)


def _digest(run_dir: RunDir) -> str | None:
    weights = run_dir.adapter / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None


@contextmanager
def _log_into(file: Path) -> Iterator[None]:
    import logging

    handler = logging.FileHandler(file)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _python() -> str:
    import platform

    return platform.python_version()
