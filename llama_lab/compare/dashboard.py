"""`dashboard STUDY`: optuna-dashboard on the storage of a study, reachable from this machine alone."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_lab.errors import ConfigError, RunError, no_folder
from llama_lab.take.options import MAX_PORT

HOST = "127.0.0.1"


def dashboard(study: Path, port: int = 0) -> int:
    """Serve until Ctrl-C; the exit code.

    Args:
        port: 0 takes one that is free.
    Raises:
        ConfigError: optuna-dashboard is not installed, or the port cannot be had.
        RunError: the folder holds no study.
    """
    address = storage_of(study)
    if find_spec("optuna_dashboard") is None:
        raise ConfigError(
            "dashboard needs the package optuna-dashboard, which is not installed. Type: "
            "python -m pip install optuna-dashboard"
        )
    from optuna_dashboard import wsgi

    from llama_lab.sweep.storage import open_storage

    try:
        server = make_server(HOST, port, wsgi(open_storage(address)), _Server, _Quiet)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or f"a port is a number up to {MAX_PORT}"
        raise ConfigError(f"--port {port}: {reason}. Leave it out to take one that is free.") from error
    with server:
        print(f"{study} in optuna-dashboard: http://{HOST}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def storage_of(study: Path) -> str:
    """The address of the storage that a study's folder speaks of.

    Raises:
        RunError: it is no folder of a study.
    """
    from llama_lab.sweep.storage import JOURNAL, storage_address

    if not os.path.isdir(study):
        raise RunError(f"{study}: {no_folder(study)} A study lies in outputs/NAME.")
    if os.path.exists(study / JOURNAL):
        return storage_address(None, study)
    try:
        storage = OmegaConf.select(OmegaConf.load(study / "multirun.yaml"), "hydra.sweeper.storage")
    except (OSError, OmegaConfBaseException):
        storage = None
    if not isinstance(storage, str):
        raise RunError(
            f"{study} is no folder of a study: there is no {JOURNAL} in it. Type the one that -m search= made."
        )
    return storage_address(storage, study)


class _Server(ThreadingMixIn, WSGIServer):
    """Each request in a thread of its own: wsgiref swallows a Ctrl-C that comes while it answers one."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Requests are not printed."""

    def log_message(self, *_: object) -> None:
        pass
