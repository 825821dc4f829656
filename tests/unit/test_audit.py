"""Data that cannot be trained on is found before anything is paid for."""

import json
from pathlib import Path

import pytest

from llama_lab.compose import compose_words
from llama_lab.data.audit import audit, numbers_of, stop_on_failure
from llama_lab.data.findings import Level
from llama_lab.data.splits import build_splits
from llama_lab.data.templates import IGNORED
from llama_lab.errors import DataError
from llama_lab.model import base_shape, load_tokenizer


def checked(tmp_path: Path, rows: list[dict], *words: str, change=None, held_out: list[dict] | None = None):
    """{check: finding} of training rows; the worst one where a check is made of both splits."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(held_out or [])]))
    config = compose_words(["model=tiny", "dataset=jsonl", f"dataset.path={file}", *words])
    tokenizer = load_tokenizer(config.model)
    splits = build_splits(config.dataset, tokenizer, seed=config.seed)
    if change:
        change(splits, tokenizer)
    order = list(Level)
    found = audit(splits, tokenizer, config.dataset, base_shape(config.model).vocab_size)
    return {f.check: f for f in sorted(found, key=lambda f: order.index(f.level))}, splits, tokenizer


def pairs(num: int, answer: str = "answer") -> list[dict]:
    return [{"prompt": f"question {i}", "completion": f"{answer} {i}"} for i in range(num)]


def changed(edit):
    """A change of the tokens of the training rows."""

    def change(splits, tokenizer):
        splits.train.tokens = splits.train.tokens.map(lambda row: edit(row, tokenizer))

    return change


def test_good_rows_have_no_finding_but_ok(tmp_path):
    found, _, _ = checked(tmp_path, pairs(40))
    assert {finding.level for finding in found.values()} == {Level.ok}
    assert {"labels", "EOS", "padding", "BOS", "template", "vocabulary", "cut rows", "duplicates", "leaks"} <= set(
        found
    )
    stop_on_failure(list(found.values()))


@pytest.mark.parametrize(
    ("check", "edit"),
    [
        ("labels", lambda row, tok: {"labels": [IGNORED] * len(row["labels"])}),
        ("EOS", lambda row, tok: {"labels": [IGNORED if t == tok.eos_token_id else t for t in row["labels"]]}),
        ("padding", lambda row, tok: {"input_ids": [*row["input_ids"], 0], "labels": [*row["labels"], 0]}),
        ("BOS", lambda row, tok: {"input_ids": [1, *row["input_ids"]], "labels": [IGNORED, *row["labels"]]}),
        ("vocabulary", lambda row, tok: {"input_ids": [*row["input_ids"], 320], "labels": [*row["labels"], 320]}),
        ("template", lambda row, tok: {"input_ids": [*row["input_ids"][:2], 7, *row["input_ids"][3:]]}),
    ],
)
def test_each_silent_fault_fails(tmp_path, check, edit):
    found, _, _ = checked(tmp_path, pairs(40), change=changed(edit))
    assert found[check].level is Level.failure, found
    with pytest.raises(DataError, match="cannot be trained on"):
        stop_on_failure(list(found.values()))


def test_bad_rows_are_counted_and_the_first_are_named(tmp_path):
    def change(splits, tokenizer):
        def edit(row, i):
            return {"labels": [IGNORED] * len(row["labels"])} if i in (3, 17) else row

        splits.train.tokens = splits.train.tokens.map(edit, with_indices=True)

    found, splits, _ = checked(tmp_path, pairs(40), change=change)
    first, second = splits.train.numbers[[3, 17]]  # as in the file, in which held-out rows lie between
    assert second > 18
    assert f"2 of 38 training rows ({first}, {second}) have none" in found["labels"].message


def test_cut_rows_warn_and_too_many_fail(tmp_path):
    rows = [*pairs(38), {"prompt": "question", "completion": "long " * 40}]
    found, _, _ = checked(tmp_path, [*rows, *pairs(1)], "dataset.max_length=64", "dataset.eval_fraction=0.03")
    few = found["cut rows"].level, found["EOS"].level
    found, _, _ = checked(tmp_path, pairs(40, "long " * 40), "dataset.max_length=64")
    assert few in ((Level.warning, Level.warning), (Level.ok, Level.ok))  # the long row may be the held-out one
    assert found["cut rows"].level is Level.failure
    assert "dataset.max_cut_share=0.25" in found["cut rows"].message
    found, _, _ = checked(tmp_path, pairs(40, "long " * 40), "dataset.max_length=64", "dataset.max_cut_share=1")
    assert found["cut rows"].level is Level.warning


def test_rows_that_were_cut_or_split_may_lack_the_eos(tmp_path):
    for long_rows in ("cut", "split"):
        words = ("dataset.max_length=64", f"dataset.long_rows={long_rows}", "dataset.max_cut_share=1")
        found, _, _ = checked(tmp_path, [*pairs(20), *pairs(20, "long " * 40)], *words)
        assert found["EOS"].level is Level.warning, found


def test_empty_rows_are_counted_and_too_many_fail(tmp_path):
    empty = [{"prompt": "", "completion": " "}]
    found, _, _ = checked(tmp_path, [*pairs(40), *empty])
    assert found["empty rows"].level in (Level.warning, Level.ok)  # the empty one may be held out
    found, _, _ = checked(tmp_path, [*pairs(20), *empty * 10])
    assert found["empty rows"].level is Level.failure
    assert "dataset.max_empty_share=0.1" in found["empty rows"].message


def test_copies_and_leaks_are_found(tmp_path):
    found, _splits, _ = checked(tmp_path, pairs(10) * 4)
    assert found["duplicates"].level is Level.failure
    assert found["leaks"].level is Level.failure  # the held-out rows are copies of training rows
    found, _, _ = checked(tmp_path, [*pairs(38), *pairs(2)], "dataset.max_leak_share=1")
    assert found["duplicates"].level in (Level.warning, Level.ok)


def test_same_prompt_with_another_answer_is_a_leak(tmp_path):
    rows = [{"prompt": "the only question", "completion": f"answer {i}"} for i in range(20)]
    found, _, _ = checked(tmp_path, rows)
    assert found["duplicates"].level is Level.ok
    assert found["leaks"].level is Level.failure


def test_numbers_are_those_of_the_rows(tmp_path):
    _, splits, tokenizer = checked(tmp_path, pairs(40))
    numbers = numbers_of(splits.train.tokens, tokenizer)
    assert numbers.lengths.tolist() == [len(row["input_ids"]) for row in splits.train.tokens]
    learned = [sum(label != IGNORED for label in row["labels"]) for row in splits.train.tokens]
    assert numbers.num_learned.tolist() == learned


# Pairs


def checked_pairs(tmp_path: Path, rows: list[dict], *words: str, change=None):
    """{check: finding} of the training rows; the worst one where several have the same name."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose_words(["model=tiny", "trainer=dpo", "dataset=jsonl", f"dataset.path={file}", *words])
    tokenizer = load_tokenizer(config.model)
    splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)
    if change:
        splits.train.tokens = splits.train.tokens.map(change)
    order = list(Level)
    found = audit(splits, tokenizer, config.dataset, base_shape(config.model).vocab_size)
    return {f.check: f for f in sorted(found, key=lambda f: order.index(f.level))}


def two_answers(num: int, better: str = "this", worse: str = "that") -> list[dict]:
    return [{"prompt": f"question {i}", "chosen": f"{better} {i}", "rejected": f"{worse} {i}"} for i in range(num)]


def test_good_pairs_have_no_finding_but_ok(tmp_path):
    found = checked_pairs(tmp_path, two_answers(40))
    assert {finding.level for finding in found.values()} == {Level.ok}
    assert {"prompts", "pairs", "lengths"} <= found.keys()


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("pairs", lambda row: {"rejected_ids": row["input_ids"], "rejected_labels": row["labels"]}),
        ("prompts", lambda row: {"rejected_ids": [row["rejected_ids"][0], 7, *row["rejected_ids"][2:]]}),
        ("EOS", lambda row: {"rejected_ids": row["rejected_ids"][:-1], "rejected_labels": row["rejected_labels"][:-1]}),
        (
            "vocabulary",
            lambda row: {
                "rejected_ids": [*row["rejected_ids"], 320],
                "rejected_labels": [*row["rejected_labels"], 320],
            },
        ),
    ],
)
def test_faults_of_pairs_fail(tmp_path, check, change):
    assert checked_pairs(tmp_path, two_answers(40), change=change)[check].level is Level.failure


def test_pairs_that_length_tells_apart_are_warned_of(tmp_path):
    found = checked_pairs(tmp_path, two_answers(40, better="this is the longer answer"))
    assert found["lengths"].level is Level.warning
    assert "length alone may be what is learned" in found["lengths"].message
