"""Runs of the real command line, on the tiny model, in a folder of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = Path(sys.prefix) / "launchers"
"""Packages for the tests alone, beside the environment: tests/launchers.txt."""
TINY = [
    "model=tiny",
    "dataset.max_train_rows=32",
    "dataset.max_eval_rows=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.save_steps=2",
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a newcomer's shell holds: no key, no token, and caches of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_", "HYDRA_", "LLAMA_LAB_"))}
    home = tmp_path_factory.mktemp("home")
    return env | {
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
        "LLAMA_LAB_CACHE": str(tmp_path_factory.getbasetemp().parent / "llama_lab_cache"),
        "OMP_NUM_THREADS": "1",
    }


class Lab:
    """`python -m llama_lab WORDS` in a folder."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def start(self, *words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
        """The running process, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "llama_lab", *map(str, words)],
            cwd=cwd,
            env=self.environment | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self, *words: str, cwd: Path, stdin: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The ended process."""
        return subprocess.run(
            [sys.executable, "-m", "llama_lab", *map(str, words)],
            cwd=cwd,
            env=self.environment | env,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run(self, folder: Path, *words: str, **env: str) -> Path:
        """A run that ends well in `folder`."""
        done = self(f"hydra.run.dir={folder}", *words, cwd=folder.parent, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    def killed(self, folder: Path, *words: str, when: Callable[[], bool], **env: str) -> None:
        """A run that gets SIGKILL, with all that it started, as soon as `when` holds."""
        process = self.start(f"hydra.run.dir={folder}", *words, cwd=folder.parent, **env)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and not when() and time.monotonic() < deadline:
                time.sleep(0.002)
            assert process.poll() is None, process.communicate()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def lab(environment: dict[str, str]) -> Lab:
    return Lab(environment)


@pytest.fixture(scope="session")
def tiny_run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of the tiny model with everything on."""
    return lab.run(tmp_path_factory.mktemp("tiny") / "run", *TINY, "trainer.eval_steps=2", "lora.r=4")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def steps_logged(folder: Path) -> list[int]:
    """The steps of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]
