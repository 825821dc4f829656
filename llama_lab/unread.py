"""What a process does once nobody reads what it prints any more: the reader of its pipe is gone, as of `... | head -1`.

A run goes on: what it learns lies in its folder, and hours of training are not lost for a line. A verb, whose output is
all that it is for, ends without a word, as the tools of Unix do that die of SIGPIPE. The signal itself stays ignored,
as Python has it: it would end a process for a connection of W&B's or the hub's that is closed, too, and would leave
half a folder of a merge.
"""

from __future__ import annotations

import io
import os
import select
import signal
import stat
import sys
from typing import Any, TextIO

END_CODE = 128 + signal.SIGPIPE
"""What a shell shows of a process that died of SIGPIPE: 141."""
_goes_on = False


def go_on_unread() -> None:
    """From now on what cannot be printed is dropped, and the process does not end for it."""
    global _goes_on
    _goes_on = True


def watch_output() -> None:
    """Put streams in the place of those that write into a pipe, so that Python and rich do not see it break."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _is_pipe(stream):
            setattr(sys, name, _watched(stream))


def flush() -> None:
    """Print what is still held back; Python would do it at its end, where a pipe that broke is one more exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


class _Pipe(io.FileIO):
    """A file whose reader may go."""

    def write(self, data: Any) -> int:
        try:
            return self._write_whole(memoryview(data).cast("B"))
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what is still to come, also of libraries in C
            os.close(nowhere)
        if not _goes_on:
            raise SystemExit(END_CODE)  # rich would make a BrokenPipeError an exit code of its own
        return memoryview(data).nbytes

    def _write_whole(self, data: memoryview) -> int:
        """Write all of it. A full pipe that does not make its writer wait, as those of Node, is waited for."""
        written = 0
        while written < len(data):
            part = super().write(data[written:])
            if part is None:
                select.select([], [self], [])
            else:
                written += part
        return written


def _watched(stream: io.TextIOWrapper) -> TextIO:
    stream.flush()
    raw = _Pipe(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _is_pipe(stream: io.TextIOWrapper) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
