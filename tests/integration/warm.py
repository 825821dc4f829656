"""`python -m llama_lab WORDS` without its eight seconds of imports: processes forked from one that has done them.

What runs is the program's own __main__ in a process, session, folder and environment of its own, down to the exit code
and what runs at its exit. Only the imported libraries are shared, as the trials of a study share theirs. The process
that a study forks its trials from is a fork as well.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import NoReturn

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What llama_lab.process sets before the imports of a run that needs no hub."""
MAX_ORDER_BYTES = 200_000
IMPORTED = (
    *("llama_lab.runner", "llama_lab.talk", "llama_lab.plan_view", "llama_lab.compare.show", "llama_lab.sweep.drive"),
    # what a run imports once it trains
    *("llama_lab.trainer", "llama_lab.preference_trainer", "llama_lab.reward_trainer", "llama_lab.policy_trainer"),
    "sentencepiece",
)
READ_BY_IMPORTS = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TRACKIO_", "PYTHON", "OMP_", "CUDA_")
"""How variables start that Python or a library reads as it is imported: a command with one needs a start of its own."""


class Nest:
    """A process that has imported the libraries, seen from the tests."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment, self.socket = environment, ours
        command = [sys.executable, "-m", "tests.integration.warm", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, env=environment | OFFLINE, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.socket.recv(100)  # its imports are done

    def can_run_with(self, env: dict[str, str]) -> bool:
        """Whether the imports that are done have read these variables as they are to be."""
        read = {name: value for name, value in env.items() if name.startswith(READ_BY_IMPORTS) and name != "HF_TOKEN"}
        return all((self.environment | OFFLINE).get(name) == value for name, value in read.items())

    def run(
        self,
        words: tuple[str, ...],
        cwd: Path,
        env: dict[str, str],
        stdin: str,
        timeout_s: float,
        kill_when: Callable[[], bool] | None = None,
        kill_by: signal.Signals = signal.SIGKILL,
    ) -> subprocess.CompletedProcess[str]:
        """The ended process of a command.

        Args:
            env: all of its environment.
            kill_when: as soon as this holds it gets `kill_by`, with all that it started.
        Raises:
            TimeoutExpired: it was killed.
        """
        order = {"words": [str(word) for word in words], "cwd": str(cwd), "env": env}
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(stdin.encode())
            files[0].seek(0)
            socket.send_fds(self.socket, [json.dumps(order).encode()], [file.fileno() for file in files])
            pid = int(self.socket.recv(100))
            if kill_when:
                deadline = time.monotonic() + timeout_s
                while not kill_when() and not select.select([self.socket], [], [], 0.002)[0]:
                    assert time.monotonic() < deadline
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, kill_by)
            self.socket.settimeout(timeout_s)
            try:
                status = int(self.socket.recv(100))
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                self.socket.settimeout(None)
                self.socket.recv(100)
                raise subprocess.TimeoutExpired(["llama_lab", *words], timeout_s) from None
            finally:
                self.socket.settimeout(None)
            out, err = (_content(file) for file in files[1:])
        return subprocess.CompletedProcess(["llama_lab", *words], os.waitstatus_to_exitcode(status), out, err)

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.wait(timeout=60)


def _content(file) -> str:
    file.seek(0)
    return file.read().decode()


def serve(channel: socket.socket) -> None:
    """Fork for each order and tell what became of it, until nobody asks any more."""
    gc.collect()
    gc.freeze()  # so that a fork copies no memory only to look for garbage in it
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, 3)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            do(json.loads(data), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(pid).encode())
        channel.send(str(os.waitpid(pid, 0)[1]).encode())


def do(order: dict, descriptors: list[int]) -> NoReturn:
    """The command, in this process, which is a fork; ends it as Python ends one, but takes no library apart."""
    atexit._clear()  # what libraries clean up at their exit, such as temporary folders, belongs to all forks
    for inherited in list(weakref.finalize._registry):
        inherited.detach()
    weakref.finalize._registered_with_atexit = False
    os.setsid()
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.path[0] = os.getcwd()
    sys.argv = ["llama_lab", *order["words"]]
    if "-m" in order["words"]:
        keep_a_fork_server()
    try:
        runpy.run_module("llama_lab", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_a_fork_server() -> None:
    """Let the process that a sweep forks its trials from be a fork of this one, which has done its imports.

    It is forked now, while there is nothing here but the libraries, and waits until multiprocessing would start Python
    for it. From there on it is multiprocessing's own.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        be_a_fork_server(theirs)
    theirs.close()
    start_python, ready = util.spawnv_passfds, [pid]

    def spawnv_passfds(path: str, args: list[str], descriptors: list[int]) -> int:
        if not ready or "multiprocessing.forkserver" not in args[-1]:
            return start_python(path, args, descriptors)
        order = {"code": args[-1], "env": dict(os.environ)}
        socket.send_fds(ours, [json.dumps(order).encode()], descriptors)
        ours.close()
        return ready.pop()

    util.spawnv_passfds = spawnv_passfds


def be_a_fork_server(channel: socket.socket) -> NoReturn:
    """Wait for what Python would have been started with, and do it; end where the sweep ends without asking."""
    data, descriptors, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, 2)
    channel.close()
    if data:
        order = json.loads(data)
        os.environ.clear()
        os.environ.update(order["env"])
        with contextlib.suppress(SystemExit):
            exec(re.sub(r"main\(\d+, \d+", "main({}, {}".format(*descriptors), order["code"], count=1), {})
    os._exit(0)


def main() -> None:
    """Import the libraries once, then serve."""
    for name in IMPORTED:
        import_module(name)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.send(b"ready")
    serve(channel)


if __name__ == "__main__":
    main()
