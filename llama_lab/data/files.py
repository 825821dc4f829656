"""Which files a data set is made of, and the look at their first rows before a run starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.data.convert import convert_rows, rows_of
from llama_lab.data.readers import READERS
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError, did_you_mean

SUFFIXES = tuple(READERS)

CHECKED_ROWS = 50_000
"""So many rows are read before the run starts; reading them takes about a second."""

ARCHIVES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")


def expanded(path: str) -> Path:
    """The path with ~ replaced; as it is where ~ names nobody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_file(path: Path, dataset: DatasetSettings, trainer: TrainerName = TrainerName.sft) -> DataFormat:
    """Read the first rows of a file or folder as training will, and refuse what cannot be trained on; their format.

    Raises:
        DataError: the file is missing, unreadable, empty, malformed, or its columns do not fit format or trainer.
    """
    form, outcomes = convert_rows(rows_of(find_files(path), CHECKED_ROWS), dataset, trainer)
    num_rows, num_read = 0, 0
    for outcome in outcomes:
        num_read += outcome.is_row
        num_rows += outcome.example is not None
    if num_rows < 2 or form is None:
        held = {0: "no rows", 1: "one row"}[num_rows]
        of = f" that can be used, of {num_read}" if num_read > num_rows else ""
        raise DataError(f"{path} holds {held}{of}; a run needs at least two, one of them held out.")
    return form


def check_package(dataset: DatasetSettings, trainer: TrainerName = TrainerName.sft) -> DataFormat:
    """`check_file` for the data file of a Python package.

    Raises:
        DataError: the package is not installed, or lacks the file; see also `check_file`.
    """
    return check_file(package_file(str(dataset.package), str(dataset.file)), dataset, trainer)


def package_file(package: str, file: str) -> Path:
    """A data file inside an installed package, which is not imported.

    Raises:
        DataError: the package is not installed, or lacks the file.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # a dotted name whose parent is not there
        spec = None
    if spec is None:
        raise DataError(
            f"The rows come from the pip package {package.replace('_', '-')}, which is not installed. "
            f"Type: python -m pip install {package.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for folder in folders:
        if (folder / file).is_file() and (folder / file).resolve().is_relative_to(folder.resolve()):
            return folder / file
    found = [(folder, held) for folder in folders for held in folder.rglob("*") if held.suffix.lower() in SUFFIXES]
    names = sorted(str(held.relative_to(folder)) for folder, held in found)
    raise DataError(
        f"dataset.file={file}: the pip package {package} has no such file. It has: {', '.join(names[:5]) or 'no data'}."
        f"{did_you_mean(file, names, 'dataset.file={}')}"
    )


def find_files(path: Path) -> list[Path]:
    """The data files that a path names: itself, or of a folder all files of its one kind, by name.

    Raises:
        DataError: there is no such file, its kind is not known, it is empty, or the folder holds none or several kinds.
    """
    files = _files_in(path) if os.path.isdir(path) else [_checked(path)]
    for file in files:
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty; a run needs at least two rows.")
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.") from None
    return files


def _files_in(folder: Path) -> list[Path]:
    try:
        held = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
    except OSError as error:
        raise DataError(f"dataset.path={folder}: the folder cannot be read: {error.strerror}.") from None
    files = [file for file in held if file.suffix.lower() in SUFFIXES]
    kinds = sorted({file.suffix.lower() for file in files})
    if not files:
        below = next((name for name in sorted(folder.iterdir()) if name.is_dir() and _holds_data(name)), None)
        hint = f" Did you mean dataset.path={below}?" if below else ""
        raise DataError(f"dataset.path={folder} is a folder without {', '.join(SUFFIXES)} files.{hint}")
    if len(kinds) > 1:
        raise DataError(
            f"dataset.path={folder} is a folder with files of several kinds: {', '.join(kinds)}. Name one of them, "
            f"such as dataset.path={files[0]}, or a folder of one kind."
        )
    return files


def _holds_data(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK) and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def _checked(path: Path) -> Path:
    if not os.path.exists(path):  # pathlib raises where a name is too long
        if os.path.islink(path):
            raise DataError(f"dataset.path={path} is a link that leads nowhere, or in a circle. Name the file itself.")
        beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK | os.X_OK) else []
        hint = did_you_mean(path.name, beside, f"{path.parent / '{}'}")
        raise DataError(f"dataset.path={path}: there is no such file.{hint or ' Check the folder and the spelling.'}")
    if path.suffix.lower() in ARCHIVES:
        raise DataError(f"dataset.path={path} is packed. Unpack it first.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"dataset.path={path}: the name must end in one of {', '.join(SUFFIXES)}.")
    return path
