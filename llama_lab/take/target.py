"""A folder or file that a verb writes: whole or not at all, and never over something that is there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llama_lab.data.files import expanded
from llama_lab.errors import RunError
from llama_lab.process import end_if_told
from llama_lab.rundir import RunDir

MAX_NAME_BYTES = 200
"""Of a new name: file systems take 255, of which the work folder beside it needs some."""
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""What the system says of a name that something else has."""


def check_target(to: Path) -> None:
    """Refuse a folder that is there or cannot be made, before anything is loaded.

    Raises:
        RunError: says which.
    """
    place = _place(to)
    _check_name(place, f"--to {to}")
    if os.path.lexists(expanded(str(to))) and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"--to {to} is there already and is not overwritten. Type another folder.")
    if place == _place(Path()) or os.path.ismount(place):  # an empty one is replaced, which these cannot be
        raise RunError(f"--to {to} is the folder you are in, or a disk. Type the name of a new folder.")
    above = next(p for p in place.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"--to {to}: {above} cannot be written into. Type another folder.")


def check_new_file(file: Path, flag: str) -> None:
    """Refuse a file that is there or cannot be made.

    Raises:
        RunError: says which.
    """
    _check_name(file, f"{flag} {file}")
    if os.path.lexists(file):
        raise RunError(f"{flag} {file} is there already and is not overwritten. Type another name.")
    above = file.absolute().parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{flag} {file}: {above} is no folder that can be written into. Type another name.")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `to` when the block ends well; else nothing is left of it.

    Raises:
        RunError: another process makes it, or has made it meanwhile.
    """
    place = _place(to)
    with _work_folder(place, f"--to {to}") as work:
        check_target(to)  # again, now that nobody else writes it
        folder = work / "new"
        folder.mkdir()
        yield folder
        end_if_told()
        _give_name(folder, place, f"--to {to}")


@contextmanager
def new_file(file: Path, flag: str) -> Iterator[Path]:
    """A file to write, which becomes `file` when the block ends well. What else lies in its folder is removed.

    Raises:
        RunError: another process makes it, or has made it meanwhile.
    """
    with _work_folder(file.absolute(), f"{flag} {file}") as work:
        check_new_file(file, flag)
        yield work / "new"
        end_if_told()
        check_new_file(file, flag)  # rename would write over it
        _give_name(work / "new", file, f"{flag} {file}")


def _place(to: Path) -> Path:
    """Where a folder really is, behind ~ and links."""
    return Path(os.path.realpath(expanded(str(to))))


def _check_name(place: Path, typed: str) -> None:
    if len(os.fsencode(place.name)) > MAX_NAME_BYTES:
        raise RunError(f"{typed}: the name is too long. Type one of at most {MAX_NAME_BYTES} bytes.")


@contextmanager
def _work_folder(place: Path, typed: str) -> Iterator[Path]:
    """An empty folder beside `place` for this process alone. Nothing is left of it, nor of what killed ones left there.

    Args:
        typed: the flag and the word after it, for the message.
    """
    work = place.with_name(f".{place.name}.partial")
    made = [p for p in work.parents if not p.exists()]
    with ExitStack() as stack:
        try:
            stack.enter_context(RunDir(work).held())
        except RunError as error:
            raise RunError(f"{typed}: {error}") from None
        try:
            _clear(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # something lies in it
                    folder.rmdir()


def _clear(work: Path) -> None:
    for old in work.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name != ".lock":
            old.unlink()


def _give_name(made: Path, place: Path, typed: str) -> None:
    try:
        made.rename(place)
    except OSError as error:
        if error.errno in TAKEN:
            raise RunError(f"{typed}: something else was put there meanwhile, and is not overwritten.") from None
        raise
