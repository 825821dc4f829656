"""Where the rows of a run come from: a file, a folder, a pip package, the hub, or llama_lab itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.data.cache import digest, file_digest
from llama_lab.data.convert import Located, rows_of
from llama_lab.data.files import expanded, find_files, package_file
from llama_lab.dataset_config import EMBEDDED_DATASETS, DatasetSettings
from llama_lab.hub import dataset_snapshot, loading

if TYPE_CHECKING:
    from datasets import Dataset


def embedded_files(name: str) -> list[Path]:
    """The training rows and the held-out rows of a data set that comes with llama_lab."""
    return [Path(__file__).parent / f"{name}_{split}.jsonl" for split in ("train", "valid")]


@dataclass(kw_only=True)
class Source:
    """Rows in their order, and a name for what they are."""

    digest: str
    """Of their content: equal only where the rows are."""
    rows: Callable[[], Iterator[Located]]
    """Reads them from the start, one at a time."""

    def first(self, limit: int | None) -> Source:
        """The first rows alone."""
        if limit is None:
            return self
        return Source(digest=digest(self.digest, limit), rows=lambda: islice(self.rows(), limit))


def open_sources(dataset: DatasetSettings) -> tuple[Source, Source | None]:
    """Training rows and held-out rows; None where these are still to be drawn from the first.

    Raises:
        DataError: the rows are not there, or cannot be read.
    """
    if dataset.name in EMBEDDED_DATASETS:
        train, valid = embedded_files(str(dataset.name))
        return _of_files([train]), _of_files([valid])
    if dataset.path is not None:
        return _of_files(find_files(expanded(dataset.path))), None
    if dataset.package is not None:
        return _of_files([package_file(dataset.package, str(dataset.file))]), None
    held_out = _of_hub(dataset, dataset.eval_split) if dataset.eval_split is not None else None
    return _of_hub(dataset, dataset.split), held_out


def _of_files(files: list[Path]) -> Source:
    # the names, too: what is told of a row's faults holds the name of its file
    return Source(
        digest=digest([(file.name, file_digest(file)) for file in files]),
        rows=lambda: rows_of(files),
    )


def _of_hub(dataset: DatasetSettings, split: str) -> Source:
    loaded = _load(dataset, split)
    files = [Path(file["filename"]) for file in loaded.cache_files]
    # `datasets` keeps the rows as memory-mapped files; their content says more than the commit they came from
    content = [file_digest(file) for file in files] or [loaded._fingerprint]
    return Source(
        digest=digest(dataset.name, dataset.subset, split, len(loaded), content),
        rows=lambda: _rows_of_hub(loaded, f"{dataset.name} {split}"),
    )


def _rows_of_hub(loaded: Dataset, source: str) -> Iterator[Located]:
    number = 0
    for table in loaded.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            number += 1
            yield Located(source, number, row)


def _load(dataset: DatasetSettings, split: str) -> Dataset:
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = str(dataset.name)
    with loading(name, "dataset.name"):
        # offline, `datasets` only knows what it has prepared itself; a downloaded copy is as good
        local = dataset_snapshot(name, dataset.revision) if HF_HUB_OFFLINE else None
        return load_dataset(local or name, dataset.subset, split=split, revision=None if local else dataset.revision)
