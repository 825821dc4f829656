"""Runs of the real command line, on the tiny model, in a folder of the test's own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_lab.sweep.slots import has_gpu

from .warm import Nest

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = Path(sys.prefix) / "launchers"
"""Packages for the tests alone, beside the environment: tests/launchers.txt."""
TIMEOUT_S = 300
TINY = [
    "model=tiny",
    "dataset.max_train_rows=32",
    "dataset.max_eval_rows=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.save_steps=2",
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all workers have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, str]:
    """What a newcomer's shell holds: no key, no token, and caches of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_", "HYDRA_", "LLAMA_LAB_"))}
    home = tmp_path_factory.mktemp("home")
    return env | {
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
        "LLAMA_LAB_CACHE": str(shared / "llama_lab_cache"),
        "OMP_NUM_THREADS": "1",
    }


class Lab:
    """`python -m llama_lab WORDS` in a folder.

    `start`, `fresh` and `killed` start Python as a user does. A call and `run` fork instead from a process that has
    imported the libraries (warm.py), unless a variable of theirs is one that is read by imports.
    """

    def __init__(self, environment: dict[str, str], nest: Nest | None) -> None:
        self.environment, self.nest = environment, nest

    def start(self, *words: str, cwd: Path, stdin: int = subprocess.DEVNULL, **env: str) -> subprocess.Popen[str]:
        """The running process, in a process group of its own; Ctrl-C reaches it also where the tests run with `&`."""
        return subprocess.Popen(
            [sys.executable, "-m", "llama_lab", *map(str, words)],
            cwd=cwd,
            env=self.environment | env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def __call__(self, *words: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """The ended process."""
        if self.nest is None or not self.nest.can_run_with(env):
            return self.fresh(*words, cwd=cwd, stdin=stdin, **env)
        return self.nest.run(words, cwd, self.environment | env, stdin, TIMEOUT_S)

    def fresh(self, *words: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """The ended process, with a start of its own."""
        return subprocess.run(
            [sys.executable, "-m", "llama_lab", *map(str, words)],
            cwd=cwd,
            env=self.environment | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def run(self, folder: Path, *words: str, fresh: bool = False, **env: str) -> Path:
        """A run that ends well in `folder`."""
        how = self.fresh if fresh else self
        done = how(f"hydra.run.dir={folder}", *words, cwd=folder.parent, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    def killed(
        self,
        folder: Path,
        *words: str,
        when: Callable[[], bool],
        by: signal.Signals = signal.SIGKILL,
        warm: bool = False,
        **env: str,
    ) -> None:
        """A run that gets SIGKILL, with all that it started, as soon as `when` holds.

        Args:
            by: another signal that ends a run; its exit code is the one of a shell.
            warm: fork it from the process that has imported the libraries.
        """
        words = (f"hydra.run.dir={folder}", *words)
        if warm and self.nest is not None:
            whole = self.environment | env
            done = self.nest.run(words, folder.parent, whole, "", TIMEOUT_S, kill_when=when, kill_by=by)
            assert done.returncode == (-by if by is signal.SIGKILL else 128 + by), done
            return
        process = self.start(*words, cwd=folder.parent, **env)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and not when() and time.monotonic() < deadline:
                time.sleep(0.002)
            assert process.poll() is None, process.communicate()
            if by is not signal.SIGKILL:
                os.killpg(process.pid, by)
                assert process.wait(timeout=60) == 128 + by
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def lab(environment: dict[str, str]) -> Iterator[Lab]:
    if has_gpu():  # what is imported would begin CUDA, and a fork could not use it
        yield Lab(environment, None)
        return
    nest = Nest(environment)
    try:
        yield Lab(environment, nest)
    finally:
        nest.close()


@pytest.fixture(scope="session")
def tiny_run(lab: Lab, shared: Path) -> Path:
    """One finished run of the tiny model with everything on, for all workers. Read it, and leave it as it is."""
    folder = shared / "tiny" / "run"
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.parent.mkdir()
            lab.run(folder, *TINY, "trainer.eval_steps=2", "lora.r=4", fresh=True)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def steps_logged(folder: Path) -> list[int]:
    """The steps of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]
