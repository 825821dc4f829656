"""run.json: what is needed to do a run again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from llama_lab import __version__
from llama_lab.config import ModelSettings, RunConfig
from llama_lab.errors import LlamaLabError, RunError
from llama_lab.results import SCHEMA
from llama_lab.same_base import was_exchanged

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
)
"""The packages whose versions change results."""

UNLOCKED = {"resume", "verbose", "tracking", "trainer.resume", "trainer.save_steps", "trainer.save_total_limit"}
"""Settings that a resumed run may change: none of them changes what is learned."""
HOW = {"trainer.engine", "trainer.memory"}
"""Settings of how it is computed, which it may change as well: by the device that it goes on on."""


def make_lock(config: RunConfig, overrides: list[str], run_id: str) -> dict[str, Any]:
    """Everything known before weights and rows are read; `runner` adds model, data set and hardware."""
    return {
        "schema": SCHEMA,
        "id": run_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "overrides": overrides,
        "config": as_plain(config),
        "code": code_state(),
        "versions": {"python": platform.python_version(), "llama_lab": __version__} | package_versions(),
        "seed": config.seed,
    }


def as_plain(config: RunConfig) -> dict[str, Any]:
    """The settings as dicts, lists, numbers and strings."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def config_of(lock: dict[str, Any]) -> RunConfig:
    """The settings that run.json holds.

    Raises:
        RunError: they are not those of this version of llama_lab.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), lock["config"])
        return cast(RunConfig, OmegaConf.to_object(merged))
    except Exception as error:
        key = getattr(error, "full_key", None)
        reason = f"{key}: " * bool(key) + str(error).splitlines()[0]
        wrote = dict(lock.get("versions") or {}).get("llama_lab", "another version")
        raise RunError(
            f"The settings in run.json are not those of llama_lab {__version__}: {reason}. Start a new run, or go on "
            f"with the version that began it ({wrote})."
        ) from error


def check_unchanged(lock: dict[str, Any], config: RunConfig) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        RunError: names each setting that differs.
    """
    before, now, new = flat(lock["config"]), flat(as_plain(config)), _new_settings(lock)
    differing = [
        f"{key}: {before[key] if key in before else new[key][0]} then, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if now.get(key) not in new.get(key, [before.get(key)]) and not _unlocked(key) and key not in HOW
    ]
    if differing:
        raise RunError(
            "A resumed run keeps its settings, and these differ: "
            + "; ".join(differing)
            + ". Leave them out, or start a new run."
        )


def check_same_base(lock: dict[str, Any], model: ModelSettings, folder: Path) -> None:
    """Refuse to go on with what was measured and trained on another base.

    Args:
        folder: of the run.
    Raises:
        RunError: the folder of the base holds other weights than when the run began.
    """
    if differs := was_exchanged(lock, model):
        raise RunError(
            f"The base is not the one that {folder} began with: {differs}. Bring its folder back as it was, or start a "
            "new run."
        )


def check_same_rows(lock: dict[str, Any], fingerprint: str, folder: Path) -> None:
    """Refuse to go on from a checkpoint with other rows than it was trained on.

    Args:
        fingerprint: of the rows as they are now.
        folder: of the run.
    Raises:
        RunError: it was another one.
    """
    before = lock.get("dataset", {}).get("fingerprint")
    if before not in (None, fingerprint):
        raise RunError(
            f"The rows are not those that {folder} began with: their fingerprint was {before} and is {fingerprint} "
            "now. Bring the data back as it was, or start a new run."
        )


def _new_settings(lock: dict[str, Any]) -> dict[str, list[Any]]:
    """Settings that did not exist when the run began, with the values that are no change: their defaults, and what the
    run's words give them now."""
    known, default = flat(lock["config"]), flat(as_plain(config_of(lock)))
    new = {key: [value] for key, value in default.items() if key not in known}
    if not new:
        return new
    from llama_lab.compose import compose_words

    try:
        composed = flat(as_plain(compose_words(list(lock.get("overrides") or []))))
    except LlamaLabError:
        return new
    return {key: [*values, composed[key]] for key, values in new.items()}


def code_state() -> dict[str, Any] | None:
    """Commit and uncommitted change of the checkout that llama_lab runs from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    return {"commit": commit and commit.strip(), "diff": _git(root, "diff", "HEAD")}


def package_versions() -> dict[str, str]:
    """The versions of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, threads, memory and GPUs; the number of threads changes results on the CPU."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "platform": f"{sys.platform} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def below(tree: dict[str, Any], *names: str) -> Any:
    """A value of nested objects; None where one of them is missing."""
    found: Any = tree
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _unlocked(key: str) -> bool:
    return key in UNLOCKED or key.split(".")[0] in UNLOCKED
