"""HTML pages that verbs write with --html: a file that is no page of ours is never overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from llama_lab.errors import RunError
from llama_lab.rundir import write_text

GENERATOR = '<meta name="generator" content="llama_lab">'
"""By which a page of ours is known; near its beginning."""


def check_page(file: Path) -> None:
    """Refuse a place for a page before anything is computed.

    Raises:
        RunError: something else is there, or nothing can be written there.
    """
    if os.path.lexists(file) and not _is_ours(file):
        raise RunError(f"--html {file} is there already, and no page of llama_lab's. Type another name.")
    above = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"--html {file}: {above} is no folder that can be written into. Type another name.")


def write_page(file: Path, text: str) -> None:
    """Write a page whole or not at all.

    Raises:
        RunError: the file cannot be written, or is no page.
    """
    check_page(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise RunError(f"--html {file} cannot be written: {error.strerror or error}. Type another file.") from None


def _is_ours(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return GENERATOR.encode() in opened.read(1000)
    except OSError:
        return False
