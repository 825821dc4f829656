"""Rows that are too long: no token and no label is lost or doubled unsaid, whatever becomes of them."""

from dataclasses import asdict
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_lab.choices import LongRows
from llama_lab.data.lengths import MAX_NAMED, Counts, fit, has_label
from llama_lab.data.templates import IGNORED

BOS = 1


@st.composite
def rows(draw) -> dict[str, list[int]]:
    """A row of up to 200 tokens that begins with a BOS; no two tokens are alike, so that each can be followed."""
    length = draw(st.integers(1, 200))
    ids = [BOS, *range(100, 99 + length)]
    learned = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    learned[0] = False
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels}


max_lengths = st.integers(8, 64)


@given(rows(), max_lengths, st.sampled_from(LongRows), st.sampled_from([BOS, None]))
def test_row_that_fits_is_left_alone_and_no_piece_is_too_long(row, max_length, long_rows, bos):
    pieces, head = fit(row, max_length, long_rows, bos)
    is_long = len(row["input_ids"]) > max_length
    assert head == ({"cut": "cut", "drop": "dropped", "split": "split"}[long_rows] if is_long else None)
    assert is_long or pieces == [row]
    assert all(len(piece["input_ids"]) == len(piece["labels"]) <= max_length for piece in pieces)


@given(rows(), max_lengths, st.sampled_from([BOS, None]))
def test_split_row_keeps_every_token_and_learns_every_label_once(row, max_length, bos):
    pieces, _ = fit(row, max_length, LongRows.split, bos)
    ids, labels = ([piece[name] for piece in pieces] for name in ("input_ids", "labels"))
    # every piece after the first has one token more in front
    assert [*ids[0], *chain.from_iterable(more[1:] for more in ids[1:])] == row["input_ids"]
    assert [*labels[0], *chain.from_iterable(more[1:] for more in labels[1:])] == row["labels"]
    assert all(more[0] == IGNORED for more in labels[1:])


@given(rows(), max_lengths)
def test_split_row_begins_every_piece_with_one_bos(row, max_length):
    pieces, _ = fit(row, max_length, LongRows.split, BOS)
    assert all(piece["input_ids"].index(BOS) == 0 and piece["input_ids"].count(BOS) == 1 for piece in pieces)


@given(rows(), max_lengths)
def test_split_row_without_a_bos_begins_a_piece_with_the_token_before(row, max_length):
    pieces, _ = fit(row, max_length, LongRows.split, None)
    assert [piece["input_ids"][0] for piece in pieces[1:]] == [piece["input_ids"][-1] for piece in pieces[:-1]]


@given(rows(), max_lengths)
def test_cut_row_is_its_beginning_and_dropped_row_is_nothing(row, max_length):
    cut, _ = fit(row, max_length, LongRows.cut, BOS)
    assert cut == [{name: ids[:max_length] for name, ids in row.items()}]
    dropped, _ = fit(row, max_length, LongRows.drop, BOS)
    assert dropped == ([row] if len(row["input_ids"]) <= max_length else [])


@pytest.mark.parametrize(("labels", "wanted"), [([IGNORED], False), ([IGNORED, 5], True), ([], False)])
def test_row_without_a_label_is_known(labels, wanted):
    assert has_label({"input_ids": labels, "labels": labels}) is wanted


def test_counts_name_the_first_rows_of_every_head():
    counts = Counts(num_read=20)
    for number in range(3, 20):
        counts.add("empty", number)
        counts.add_bad(f"row {number}: why", number)
    counts.add("cut", 7)
    assert [counts.num_empty, counts.num_bad, counts.num_cut, counts.num_dropped] == [17, 17, 1, 0]
    assert counts.first == {"empty": [3, 4, 5, 6, 7], "bad": [3, 4, 5, 6, 7], "cut": [7]}
    assert counts.faults == [f"row {number}: why" for number in range(3, 3 + MAX_NAMED)]
    assert Counts(**asdict(counts)) == counts


def test_first_label_of_a_row_is_not_counted_as_learned():
    counts = Counts()
    counts.add_piece({"input_ids": [5, 6, 7], "labels": [5, IGNORED, 7]})
    assert [counts.num_pieces, counts.num_tokens, counts.num_supervised] == [1, 3, 1]
