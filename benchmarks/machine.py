"""What benchmarks have in common: the environment of their processes, and what is told of the machine and the code."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_lab.lock import code_state, cpu_name

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """In which llama_lab is this checkout's, whatever the folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def commit() -> dict[str, str]:
    """What was measured, where this is a checkout: its commit, with a + where it was changed."""
    code = code_state()
    return {"commit": str(code["commit"])[:7] + ("+" if code["diff"] else "")} if code else {}


def facts(*packages: str) -> dict[str, Any]:
    """Versions of these packages, Python, processor, load and commit."""
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        **commit(),
    }
