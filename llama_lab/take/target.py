"""A folder or file that a verb writes: whole or not at all, and never over something that is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_lab.errors import RunError


def check_target(to: Path) -> None:
    """Refuse a folder that is there or cannot be made, before anything is loaded.

    Raises:
        RunError: says which.
    """
    if os.path.lexists(to) and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"--to {to} is there already and is not overwritten. Type another folder.")
    above = next(p for p in to.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"--to {to}: {above} cannot be written into. Type another folder.")


def check_new_file(file: Path, flag: str) -> None:
    """Refuse a file that is there or cannot be made.

    Raises:
        RunError: says which.
    """
    if os.path.lexists(file):
        raise RunError(f"{flag} {file} is there already and is not overwritten. Type another name.")
    above = file.absolute().parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{flag} {file}: {above} is no folder that can be written into. Type another name.")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to fill beside `to`, which it becomes when the block ends well; else nothing is left of it."""
    partial = to.absolute().with_name(f".{to.name}.partial")
    made = [p for p in partial.parents if not p.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if to.is_dir():
            to.rmdir()  # empty: check_target
        partial.rename(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise
