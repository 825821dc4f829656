"""What the benchmarks on a CPU have in common: the environment of their processes, and what is told of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_lab.lock import cpu_name

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """In which llama_lab is this checkout's, whatever the folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def facts(*packages: str) -> dict[str, Any]:
    """Versions of these packages, Python, processor and load."""
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
    }
