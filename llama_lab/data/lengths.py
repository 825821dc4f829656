"""Rows that are longer than dataset.max_length, and the count of what became of every row."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_lab.choices import LongRows
from llama_lab.data.templates import IGNORED

Tokens = dict[str, list[int]]
"""input_ids and labels of one row, of equal length."""

MAX_NAMED = 5
"""So many rows of every kind are named by their number."""


@dataclass(kw_only=True)
class Counts:
    """What became of the rows of one split. A row may be counted under several heads: cut, and then without a label."""

    num_read: int = 0
    """Rows of the split in the data set; all that follow are of these."""
    num_kept: int = 0
    """Rows that are trained on or measured."""
    num_pieces: int = 0
    """Rows of tokens; more than num_kept where long rows were split."""
    num_cut: int = 0
    """Longer than dataset.max_length: their end was left out."""
    num_dropped: int = 0
    """Longer than dataset.max_length: left out."""
    num_split: int = 0
    """Longer than dataset.max_length: continued in further rows of tokens."""
    num_empty: int = 0
    """White space or null only: left out."""
    num_bad: int = 0
    """Could not be read or converted: left out, by dataset.skip_bad_rows."""
    num_trimmed: int = 0
    """Conversations that lost a last question without an answer, or a first answer without a question."""
    num_unlabelled: int = 0
    """Left with no token to learn: left out."""
    num_tokens: int = 0
    """In the rows of tokens, padding aside."""
    num_supervised: int = 0
    """Labels that are learned; the first of a row is not, since nothing comes before it."""
    num_tokens_cut: int = 0
    """In no row of tokens because of dataset.max_length: cut ends, and rows that were dropped."""
    longest: int = 0
    """Tokens of the longest row before it was cut, dropped or split."""
    first: dict[str, list[int]] = field(default_factory=dict)
    """By head (cut, dropped, split, empty, bad, trimmed, unlabelled) the first rows, numbered as in the data set."""
    faults: list[str] = field(default_factory=list)
    """Why the first bad rows are bad."""

    def add(self, head: str, number: int) -> None:
        """Count a row under num_HEAD.

        Args:
            number: of the row in the data set, from 1.
        """
        setattr(self, f"num_{head}", getattr(self, f"num_{head}") + 1)
        named = self.first.setdefault(head, [])
        if len(named) < MAX_NAMED:
            named.append(number)

    def add_bad(self, fault: str, number: int) -> None:
        """Count a row that cannot be used."""
        self.add("bad", number)
        if len(self.faults) < MAX_NAMED:
            self.faults.append(fault)

    def add_piece(self, piece: Tokens) -> None:
        """Count a row of tokens."""
        self.num_pieces += 1
        self.num_tokens += len(piece["input_ids"])
        self.num_supervised += sum(label != IGNORED for label in piece["labels"][1:])


def fit(row: Tokens, max_length: int, long_rows: LongRows, bos: int | None) -> tuple[list[Tokens], str | None]:
    """The rows of tokens that become of one, and under which head it is counted; None where it is not too long.

    A row that is continued: each further piece begins with the BOS, as the model knows no text without one; without a
    BOS, with the last token of the piece before. That one token is not learned again, so every label of the row stands
    in exactly one piece.

    Args:
        bos: the token with which the tokenizer begins every text, if it has such a one.
    """
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) <= max_length:
        return [row], None
    if long_rows is LongRows.drop:
        return [], "dropped"
    pieces = [{"input_ids": ids[:max_length], "labels": labels[:max_length]}]
    if long_rows is LongRows.cut:
        return pieces, "cut"
    for start in range(max_length, len(ids), max_length - 1):
        lead = ids[start - 1] if bos is None else bos
        end = start + max_length - 1
        pieces.append({"input_ids": [lead, *ids[start:end]], "labels": [IGNORED, *labels[start:end]]})
    return pieces, "split"


def has_label(piece: Tokens) -> bool:
    """Whether anything is learned from a row of tokens."""
    return any(label != IGNORED for label in piece["labels"])
