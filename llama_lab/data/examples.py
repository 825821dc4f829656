"""Examples on disk: every row of a source is converted once, and decoded again when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.data.cache import LATER_SETTINGS, cached, code_digest, digest, settings_without
from llama_lab.data.convert import Outcome, convert_rows
from llama_lab.data.sources import Source
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

FILE = "examples.arrow"
BATCH = 1000
"""Rows that are in memory at once."""

NOT_READ_HERE = (
    *("max_length", "long_rows", "loss_on", "eval_fraction", "max_train_rows", "max_eval_rows"),
    *LATER_SETTINGS,
)
"""Settings that do not change what a row means."""


@dataclass(kw_only=True)
class Store:
    """The outcomes of all rows of a source, in their order; nothing of them is in memory."""

    rows: Dataset
    """Columns `example` (JSON, null where the row was left out), `fault` (null where there is none), `trimmed`."""
    format: DataFormat
    breaks: list[str]
    """Where files break off, and what was dropped."""
    digest: str

    def outcomes(self, indices: np.ndarray) -> Iterator[Outcome]:
        """The outcomes of some rows, by their place counted from 0."""
        for start in range(0, len(indices), BATCH):
            places = indices[start : start + BATCH].tolist()
            first, last = places[0], places[-1]
            # rows that lie together are read together
            batch = self.rows[first : last + 1] if places == list(range(first, last + 1)) else self.rows[places]
            for example, fault, trimmed in zip(batch["example"], batch["fault"], batch["trimmed"], strict=True):
                yield Outcome(None if example is None else json.loads(example), fault, trimmed)


class Examples(Sequence[dict[str, Any]]):
    """Some examples of a store as a list would hold them, decoded when they are asked for."""

    def __init__(self, store: Store, indices: np.ndarray) -> None:
        self._store, self._indices = store, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return list(self._decoded(self._indices[index]))
        return next(self._decoded(self._indices[[index]]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._decoded(self._indices)

    def _decoded(self, indices: np.ndarray) -> Iterator[dict[str, Any]]:
        return (outcome.example for outcome in self._store.outcomes(indices) if outcome.example is not None)


def store_examples(
    source: Source, dataset: DatasetSettings, trainer: TrainerName, form: DataFormat | None = None
) -> Store:
    """Convert the rows of a source, or take what a run before has converted.

    Args:
        form: that of the training rows, which the held-out rows share.
    Raises:
        DataError: rows that cannot be read or converted, named by their place; or there are none.
    """
    from datasets import Dataset

    settings = settings_without(dataset, *NOT_READ_HERE)
    key = digest(code_digest(), source.digest, settings, form, trainer)  # some rows do not fit a trainer

    def make(folder: Path) -> dict[str, Any]:
        found, outcomes = convert_rows(source.rows(), dataset, trainer, form)
        if found is None:
            told = [f" The first that is no row: {outcome.fault}" for outcome in islice(outcomes, 1)]
            raise DataError(f"The data set holds no rows.{''.join(told)}")
        breaks: list[str] = []
        _write(folder / FILE, _rows_alone(outcomes, breaks))
        return {"format": str(found), "breaks": breaks}

    folder, known = cached("examples", key, make)
    rows = Dataset.from_file(str(folder / FILE))
    return Store(rows=rows, format=DataFormat(known["format"]), breaks=known["breaks"], digest=key)


def _rows_alone(outcomes: Iterable[Outcome], breaks: list[str]) -> Iterator[Outcome]:
    """The outcomes of rows; where a file breaks off goes to `breaks`."""
    for outcome in outcomes:
        if outcome.is_row:
            yield outcome
        elif outcome.fault is not None:
            breaks.append(outcome.fault)


def _write(file: Path, outcomes: Iterable[Outcome]) -> None:
    import pyarrow

    schema = pyarrow.schema(
        {"example": pyarrow.large_string(), "fault": pyarrow.large_string(), "trimmed": pyarrow.bool_()}
    )
    outcomes = iter(outcomes)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(outcomes, BATCH)):
            examples = [None if o.example is None else json.dumps(o.example, ensure_ascii=False) for o in batch]
            columns = [examples, [o.fault for o in batch], [o.trimmed for o in batch]]
            arrays = [pyarrow.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
