"""Examples to rows of tokens on disk: made once for a tokenizer and its settings, then read back memory-mapped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_lab.choices import DataFormat, LongRows, LossOn
from llama_lab.data.answers import PAIRED, encode_answers, fit_answers
from llama_lab.data.cache import LATER_SETTINGS, cached, code_digest, digest, settings_without, tokenizer_digest
from llama_lab.data.examples import Examples, Store
from llama_lab.data.ghost import ghost_attention, ghost_loss_on
from llama_lab.data.lengths import Counts, fit, has_label
from llama_lab.data.templates import IGNORED, adds_bos, encode, encode_prompt
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 2**18
"""Tokens that are in memory at once."""

PREFERENCES = (DataFormat.preference, DataFormat.unpaired_preference)


@dataclass(kw_only=True)
class Drawn:
    """The rows of one split, before they are tokenised."""

    kind: str
    """`training` or `held-out`, for messages."""
    store: Store
    indices: np.ndarray
    """Their places in the store, from 0, in its order."""


@dataclass(kw_only=True)
class Split:
    """Rows of one kind: as the person wrote them, and as the model reads them."""

    examples: Examples
    """One a row that is kept; decoded when asked for."""
    tokens: Dataset
    """Columns input_ids and labels, lists of equal length; rows without a label are left out. Of preference rows these
    are the better answer's, and there is more (answers.py)."""
    numbers: np.ndarray
    """For every row of tokens the number of its row in the data set, from 1."""
    counts: Counts

    @property
    def num_cut(self) -> int:
        """Rows longer than dataset.max_length that were cut at their end."""
        return self.counts.num_cut


def tokenise(
    drawn: list[Drawn], form: DataFormat, loss_on: LossOn, dataset: DatasetSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Split], str]:
    """The splits as tokens, or what a run before has made of the same; and the fingerprint of all.

    Raises:
        DataError: the template refuses a row, named by its number; or a split is left with nothing to learn.
    """
    from datasets import Dataset

    settings = settings_without(dataset, *LATER_SETTINGS) | {"loss_on": loss_on}
    rows = [(split.store.digest, hashlib.sha256(split.indices.tobytes()).hexdigest()) for split in drawn]
    key = digest(code_digest(), rows, settings, form, tokenizer_digest(tokenizer))

    def make(folder: Path) -> dict[str, Any]:
        counts = [Counts(num_read=len(split.indices)) for split in drawn]
        written = []
        for split, count in zip(drawn, counts, strict=True):
            if form in PREFERENCES:
                rows = _preferences(split, count, dataset, tokenizer)
            elif form is DataFormat.prompt:
                rows = _prompts(split, count, dataset, tokenizer)
            else:
                rows = _pieces(split, count, loss_on, dataset, tokenizer)
            written.append(_write(folder / f"{split.kind}.arrow", rows, form))
            if not count.num_kept:
                raise DataError(_nothing_left(split, count, dataset))
        return {"fingerprint": digest(written)[:16], "counts": [asdict(count) for count in counts]}

    folder, known = cached("tokens", key, make)
    splits = []
    for split, counts in zip(drawn, known["counts"], strict=True):
        rows_of_tokens = Dataset.from_file(str(folder / f"{split.kind}.arrow"))
        numbers = rows_of_tokens.data.column("row").to_numpy()
        splits.append(
            Split(
                examples=Examples(split.store, np.unique(numbers) - 1),
                tokens=rows_of_tokens.remove_columns("row"),
                numbers=numbers,
                counts=Counts(**counts),
            )
        )
    return splits, known["fingerprint"]


def _pieces(
    drawn: Drawn, counts: Counts, loss_on: LossOn, dataset: DatasetSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """The rows of tokens of a split, each with the number of its row; `counts` learns what became of all."""
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    encoded = partial(_encoded, tokenizer=tokenizer, loss_on=loss_on, dataset=dataset)
    for number, row in _tokenised(drawn, counts, dataset, encoded):
        length = len(row["input_ids"])
        fitted, head = fit(row, dataset.max_length, dataset.long_rows, bos)
        if head is not None:
            counts.add(head, number)
            counts.num_tokens_cut += length - (length if head == "split" else sum(len(p["input_ids"]) for p in fitted))
        counts.longest = max(counts.longest, length)
        pieces = [piece for piece in fitted if has_label(piece)]
        if fitted and not pieces:
            counts.add("unlabelled", number)
        counts.num_kept += bool(pieces)
        for piece in pieces:
            counts.add_piece(piece)
            yield piece | {"row": number}


def _encoded(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, dataset: DatasetSettings
) -> dict[str, list[int]]:
    if dataset.ghost_attention and "messages" in example:
        messages = example["messages"]
        return encode({"messages": ghost_attention(messages)}, tokenizer, ghost_loss_on(messages, loss_on))
    return encode(example, tokenizer, loss_on)


def _preferences(
    drawn: Drawn, counts: Counts, dataset: DatasetSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Preference rows, each with the tokens of all its answers."""
    for number, row in _tokenised(drawn, counts, dataset, partial(encode_answers, tokenizer=tokenizer)):
        counts.longest = max(counts.longest, len(row["input_ids"]), len(row.get("rejected_ids", ())))
        kept, head, lost = fit_answers(row, dataset.max_length, dataset.long_rows)
        counts.num_tokens_cut += lost
        if head is not None:
            counts.add(head, number)
        if kept is None and head != "dropped":
            counts.add("unlabelled", number)
        if kept is not None:
            counts.num_kept += 1
            counts.add_piece(kept)
            yield kept | {"row": number}


def _prompts(
    drawn: Drawn, counts: Counts, dataset: DatasetSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Prompts alone, of which nothing is learned; one that is too long is left out, as half a question is none."""

    def encoded(example: dict[str, Any]) -> dict[str, Any]:
        ids = encode_prompt(example["prompt"], tokenizer)
        return {"input_ids": ids, "labels": [IGNORED] * len(ids)}

    for number, row in _tokenised(drawn, counts, dataset, encoded):
        length = len(row["input_ids"])
        counts.longest = max(counts.longest, length)
        if length > dataset.max_length:
            counts.add("dropped", number)
            counts.num_tokens_cut += length
            continue
        counts.num_kept += 1
        counts.add_piece(row)
        yield row | {"row": number}


def _tokenised(
    drawn: Drawn, counts: Counts, dataset: DatasetSettings, encoded: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and tokens of the rows that the template can render; the others stop the run, or are counted."""
    for number, example in _usable(drawn, counts):
        try:
            yield number, encoded(example)
        except DataError as error:
            if not dataset.skip_bad_rows:
                raise DataError(f"{drawn.kind} row {number}: {error}") from None
            counts.add_bad(f"row {number}: {error}", number)


def _usable(drawn: Drawn, counts: Counts) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and example of the rows that could be converted; the others are counted."""
    for index, outcome in zip(drawn.indices.tolist(), drawn.store.outcomes(drawn.indices), strict=True):
        number = index + 1
        if outcome.trimmed:
            counts.add("trimmed", number)
        if outcome.fault is not None:
            counts.add_bad(outcome.fault, number)
        elif outcome.example is None:
            counts.add("empty", number)
        else:
            yield number, outcome.example


def _write(file: Path, rows: Iterator[dict[str, Any]], form: DataFormat) -> str:
    """Write rows in batches; the digest of their content, in which the batches and the numbers of the rows are not."""
    import pyarrow

    schema, content = _schema(form), hashlib.sha256()
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        batch: list[dict[str, Any]] = []
        num_tokens = 0

        def flush() -> None:
            if batch:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()

        for row in rows:
            content.update(_content(row))
            batch.append(row)
            num_tokens += len(row["input_ids"]) + len(row.get("rejected_ids", ()))
            if num_tokens >= BATCH_TOKENS:
                flush()
                num_tokens = 0
        flush()
    return content.hexdigest()


def _content(row: dict[str, Any]) -> bytes:
    if not row.keys() <= {"input_ids", "labels", "row"}:
        return json.dumps({name: value for name, value in row.items() if name != "row"}).encode() + b"\n"
    length = len(row["input_ids"])
    return length.to_bytes(4, "little") + array("i", row["input_ids"]).tobytes() + array("i", row["labels"]).tobytes()


def _schema(form: DataFormat) -> Any:
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    more = {
        DataFormat.preference: dict.fromkeys(PAIRED, ids),
        DataFormat.unpaired_preference: {"is_good": pyarrow.bool_()},
    }.get(form, {})
    return pyarrow.schema({"input_ids": ids, "labels": ids} | more | {"row": pyarrow.int64()})


def _nothing_left(drawn: Drawn, counts: Counts, dataset: DatasetSettings) -> str:
    if counts.num_unlabelled + counts.num_dropped:
        drop = ", or dataset.long_rows=cut" if dataset.long_rows is LongRows.drop else ""
        return (
            f"No {drawn.kind} row has a token to learn within dataset.max_length={dataset.max_length}. "
            f"Type a larger one{drop}."
        )
    first = f" The first of them: {counts.faults[0]}" if counts.faults else ""
    return (
        f"No {drawn.kind} row can be used: of {counts.num_read}, {counts.num_empty} are empty and {counts.num_bad} "
        f"cannot be read or converted.{first}"
    )
