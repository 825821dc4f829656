"""How an error ends the process: one message and an exit code, and a traceback for who asks."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from llama_lab.errors import LlamaLabError

FULL_ERROR = "HYDRA_FULL_ERROR"
_USERS_FULL_ERROR = "LLAMA_LAB_FULL_ERROR"
"""What the user's FULL_ERROR was, while Hydra sees another; processes that a sweep starts inherit both."""
_IN_LOG = "llama_lab_in_log"
"""An attribute of an error whose traceback a run's log has."""
OUT_OF_MEMORY = (
    "the GPU's memory is full. Halve trainer.per_device_train_batch_size and double "
    "trainer.gradient_accumulation_steps, or type trainer.memory=lean (with trainer.engine=standard "
    "trainer.gradient_checkpointing=true), or a smaller dataset.max_length."
)
OF_THE_USER = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.EFBIG,
    errno.ESTALE,
)
"""What the system refuses that a person can mend."""
OF_A_NAME = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.ENXIO,
)
"""What it refuses of a name that a person has typed; without a name it is a fault of ours."""
DISK_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|inline_container.* unexpected pos")
"""What Python, safetensors and torch say where the disk is full; torch does not say why it could not write."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, comes from a full disk."""
    seen: list[BaseException] = []  # a chain may end in itself
    while error is not None and error not in seen:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or DISK_FULL.search(str(error)):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def of_the_system(error: OSError) -> str:
    """The message for a file that cannot be read or written."""
    what = error.filename or "The output"
    if is_disk_full(error):
        return f"{what}: the disk is full. Free some space there, and type the same command again."
    return f"{what}: {error.strerror}. Look whether it is there and may be written, or name another place."


def log_failure(error: Exception) -> None:
    """Write the traceback of a run that failed into its log, which is set up by then."""
    logging.getLogger(__name__).error("The run failed", exc_info=error)
    setattr(error, _IN_LOG, True)


def report_error(error: BaseException) -> int:
    """Print one message for `error`, a traceback too where HYDRA_FULL_ERROR=1 asks for it; the exit code."""
    if os.environ.get(_USERS_FULL_ERROR, os.environ.get(FULL_ERROR)) == "1":
        traceback.print_exception(error)
    if isinstance(error, LlamaLabError):
        print(f"llama_lab: {error}", file=sys.stderr)
        return error.exit_code
    if type(error).__name__ == "OutOfMemoryError":
        print(f"llama_lab: {OUT_OF_MEMORY}", file=sys.stderr)
        return LlamaLabError.exit_code
    if isinstance(error, OSError) and (error.errno in OF_THE_USER or (error.filename and error.errno in OF_A_NAME)):
        print(f"llama_lab: {of_the_system(error)}", file=sys.stderr)
        return LlamaLabError.exit_code
    where = "llama_lab.log in the run's folder has the traceback, and " if hasattr(error, _IN_LOG) else ""
    shown = "it here" if where else "the traceback"
    print(f"llama_lab: {type(error).__name__}: {error}\n{where}{FULL_ERROR}=1 shows {shown}.", file=sys.stderr)
    return 1


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them; what the user asked for is kept beside."""
    before = {name: os.environ.get(name) for name in (FULL_ERROR, _USERS_FULL_ERROR)}
    os.environ.setdefault(_USERS_FULL_ERROR, before[FULL_ERROR] or "0")
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
