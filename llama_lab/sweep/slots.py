"""Where trials run side by side: GPUs and threads for each slot, found out without touching CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache

import psutil


@lru_cache
def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(str(number) for number in range(len(lines))) if listed.returncode == 0 else ()


@lru_cache
def gpu_memory_gib(gpu: str) -> float:
    """Memory of a GPU by the name that CUDA_VISIBLE_DEVICES gives it, GiB; 0 where the driver does not say."""
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return float(told.stdout.split()[0]) / 1024
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return 0.0


def has_gpu() -> bool:
    """Whether this process may use a GPU."""
    return bool(visible_gpus())


def gpu_of(slot: int) -> str | None:
    """The GPU of a slot; several slots share one where there are fewer GPUs. None where there is none."""
    gpus = visible_gpus()
    return gpus[slot % len(gpus)] if gpus else None


def threads_of(num_jobs: int) -> int | None:
    """Threads of a trial on the CPU; None leaves it to the libraries, as a single run does."""
    if num_jobs == 1 or os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, (psutil.cpu_count() or 1) // num_jobs)
