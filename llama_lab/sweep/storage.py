"""Where a study is kept: a journal file, a database, or Optuna's gRPC proxy."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from llama_lab.errors import ConfigError, RunError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "study.journal"
LOCK_GRACE_S = 10
"""A writer holds the journal's lock for milliseconds; one that was killed holds it so long."""
CONNECT_S = 10
"""A gRPC proxy that does not answer by then is not there."""
RECORD = b'{"op_code":'
"""What a journal begins with."""
PARALLEL_CREATION = ("exist", "duplicate", "unique")
"""What a database says when two processes create its tables at once."""
PIP_NAMES = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary"}
"""Drivers whose package has another name than their module."""


def storage_address(storage: str | None, folder: Path) -> str:
    """The storage by an address that holds in every folder and process.

    Args:
        storage: hydra.sweeper.storage.
        folder: the study's.
    Raises:
        ConfigError: it is neither a journal file nor an address, or a database that no other process can see.
    """
    if storage is None:
        return str((folder / JOURNAL).resolve())
    if "://" not in storage:
        if not storage.endswith((".journal", ".log")):
            name = storage.rstrip("/").removesuffix(".journal") or "study"
            raise ConfigError(
                f"hydra.sweeper.storage={storage} is neither a file NAME.journal nor an address such as "
                f"sqlite:///study.db, postgresql://USER@HOST/NAME or grpc://HOST:PORT. Type "
                f"hydra.sweeper.storage={name}.journal"
            )
        return str(Path(storage).expanduser().resolve())
    kind, _, rest = storage.partition("://")
    if kind == "grpc" and not rest.rpartition(":")[2].isdecimal():
        raise ConfigError(f"hydra.sweeper.storage={storage} has no port. Type grpc://HOST:PORT.")
    if kind.partition("+")[0] == "sqlite":
        return _whole_sqlite_address(storage)
    return storage


def _whole_sqlite_address(storage: str) -> str:
    """An SQLite address with the whole path of its file, and its parameters; SQLite's own file:... stays one."""
    from sqlalchemy.engine import make_url

    url = make_url(storage)  # whether a % in it stands for itself depends on SQLAlchemy's version
    file, parameters = url.database or "", dict(url.query)
    is_uri = file.startswith("file:") and str(parameters.get("uri", "")).lower() in ("true", "1", "yes", "on")
    name = unquote(file.removeprefix("file:")) if is_uri else file
    if name in ("", ":memory:") or parameters.get("mode") == "memory":
        raise ConfigError(
            f"hydra.sweeper.storage={storage} is a database in memory, which the trials do not see and which is gone "
            "afterwards. Type hydra.sweeper.storage=sqlite:///study.db, or leave it out."
        )
    whole = str(Path(name).resolve())
    return url.set(database=f"file:{quote(whole)}" if is_uri else whole).render_as_string(hide_password=False)


def shown_address(address: str) -> str:
    """The address without the password that may stand in it."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", address)


def open_storage(address: str) -> BaseStorage:
    """The storage at an address that `storage_address` gave.

    Raises:
        RunError: it cannot be reached or read.
        ConfigError: the package that speaks with it is not installed.
    """
    shown = shown_address(address)
    try:
        return _open(address)
    except ImportError as error:
        package = error.name or getattr(error.__cause__, "name", None)  # Optuna raises one of its own for drivers
        raise ConfigError(
            f"hydra.sweeper.storage={shown} needs the package {package}, which is not installed. Type: "
            f"python -m pip install {PIP_NAMES.get(str(package), package)}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{shown} is no journal of a study, or damaged: {error}. Name another file.") from error
    except OSError as error:
        raise RunError(f"hydra.sweeper.storage={shown} cannot be opened: {error.strerror or error}.") from error
    except Exception as error:
        if type(error).__module__.startswith(("sqlalchemy", "psycopg", "grpc")):
            reason = shown_address(str(error).partition("\n")[0]) or type(error).__name__
            raise RunError(f"hydra.sweeper.storage={shown} cannot be reached: {reason}.") from error
        raise


@contextmanager
def in_use(address: str) -> Iterator[None]:
    """Tell in one message what a storage says that could be opened, and cannot be read or written any more.

    Raises:
        RunError: so it is.
    """
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        reason = shown_address(str(error.__cause__ or error).partition("\n")[0])
        raise RunError(
            f"hydra.sweeper.storage={shown_address(address)} cannot be read or written any more: {reason}. Mend that, "
            "and type the same command: it goes on with the study."
        ) from error


def check_journal(path: Path) -> None:
    """Refuse a file that is no journal, before anything is written into it. What follows its last newline is half a
    record, which is cut off.

    Raises:
        RunError: names the line, or what stands in place of a file.
    """
    if path.exists() and not path.is_file():
        raise RunError(f"hydra.sweeper.storage={path} is no file. Name another one, such as study.journal.")
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    half = rest.rstrip(b"\0")  # a power cut leaves zeros
    if not lines and half[: len(RECORD)] != RECORD[: len(half)]:
        lines = [rest]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "op_code" not in record:
            raise RunError(
                f"{path} is no journal of a study, or damaged: line {number} is no record. Name another file, or take "
                "that line out."
            )


def _open(address: str) -> BaseStorage:
    from optuna import __version__, storages

    if "://" not in address:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        check_journal(Path(address))
        try:
            return storages.JournalStorage(_mending_journal(address))
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"{address} is damaged, or of another version of Optuna: {__version__} cannot read a record of it "
                f"({type(error).__name__}: {error}). Name another file."
            ) from error
    kind, _, rest = address.partition("://")
    if kind == "grpc":
        host, _, port = rest.rpartition(":")
        with warnings.catch_warnings():  # that it is experimental
            warnings.simplefilter("ignore")
            proxy = storages.GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=CONNECT_S)
        return proxy
    # a second writer of an sqlite file waits; a database may have closed an idle connection
    engine: dict[str, Any] = {"connect_args": {"timeout": 60}} if kind.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(5):
        try:
            return storages.RDBStorage(address, engine_kwargs=engine)
        except Exception as error:
            if attempt == 4 or not any(word in str(error).lower() for word in PARALLEL_CREATION):
                raise
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def _mending_journal(path: str) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    class MendingJournal(JournalFileBackend):
        """Optuna's journal file, but half a record that a killed writer left is cut off instead of written on."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._lock.acquire()
            try:
                cut_half_record(self._file_path)
                lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
                with open(self._file_path, "ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                self._lock.release()

    return MendingJournal(path, lock_obj=JournalFileSymlinkLock(path, grace_period=LOCK_GRACE_S))


def cut_half_record(path: str) -> int:
    """Cut what follows the last newline; call it under the journal's lock. The number of bytes that were cut."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return 0
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return 0
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        return size - whole
