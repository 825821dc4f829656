"""Rows to training and held-out tokens: nothing is lost unsaid, and equal data has an equal fingerprint."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llama_lab.choices import DataFormat, LongRows, LossOn
from llama_lab.compose import compose_words
from llama_lab.config import ModelSettings
from llama_lab.data.splits import Splits, build_splits, resolve_loss_on
from llama_lab.data.templates import IGNORED
from llama_lab.dataset_config import ColumnSettings, DatasetSettings
from llama_lab.errors import ConfigError, DataError
from llama_lab.model import load_tokenizer

CHATS = [{"prompt": f"number {i}", "completion": f"answer {i}"} for i in range(20)]


@pytest.fixture
def build(tmp_path, tiny_tokenizer):
    """build(rows, seed=0, tokenizer=..., **dataset settings): the splits of rows written to a file."""

    def build(rows: list[dict[str, Any]], *, seed: int = 0, tokenizer: Any = tiny_tokenizer, **kwargs: Any) -> Splits:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_splits(DatasetSettings(path=str(path), **kwargs), tokenizer, seed=seed)

    return build


def prompts(split) -> list[str]:
    return [example["messages"][0]["content"] for example in split.examples]


# The draw


def test_every_row_is_in_one_split_and_in_file_order(build):
    splits = build(CHATS, eval_fraction=0.25)
    train, valid = prompts(splits.train), prompts(splits.valid)
    assert len(valid) == 5
    assert sorted(train + valid) == sorted(row["prompt"] for row in CHATS)
    assert [train, valid] == [sorted(kind, key=lambda p: int(p.split()[1])) for kind in (train, valid)]


@pytest.mark.parametrize(("seed", "held_out"), [(0, [2, 4, 6, 13, 19]), (1, [1, 7, 10, 16, 18])])
def test_held_out_rows_are_those_of_every_version(build, seed, held_out):
    """A run of an older version is only comparable if it was measured on the same rows."""
    splits = build(CHATS, seed=seed, eval_fraction=0.25)
    assert prompts(splits.valid) == [f"number {i}" for i in held_out]


def test_held_out_rows_are_drawn_by_the_seed(build):
    drawn = [prompts(build(CHATS, seed=seed, eval_fraction=0.25).valid) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_at_least_one_row_is_held_out(build):
    splits = build(CHATS[:2], eval_fraction=0.01)
    assert len(splits.train.examples) == len(splits.valid.examples) == 1


def test_max_rows_keep_the_first_of_each_split(build):
    whole = build(CHATS, eval_fraction=0.25)
    cut = build(CHATS, eval_fraction=0.25, max_train_rows=3, max_eval_rows=2)
    assert prompts(cut.train) == prompts(whole.train)[:3]
    assert prompts(cut.valid) == prompts(whole.valid)[:2]
    assert len(cut.train.tokens) == 3


def test_file_of_one_row_is_refused(build):
    with pytest.raises(DataError, match="leaves 0 rows to train on and 1 held out"):
        build(CHATS[:1])


def test_sample_is_split_as_it_is_shipped(tiny_tokenizer):
    dataset = compose_words(["model=tiny", "dataset=sample", "dataset.max_train_rows=6"]).dataset
    splits = build_splits(dataset, tiny_tokenizer, seed=0)
    assert [len(splits.train.examples), len(splits.valid.examples)] == [6, 32]
    assert splits.format is DataFormat.prompt_completion


# Tokens


def test_tokens_are_those_of_the_examples(build, tiny_tokenizer):
    splits = build(CHATS)
    for example, row in zip(splits.train.examples, splits.train.tokens, strict=True):
        asked, answer = (message["content"] for message in example["messages"])
        assert tiny_tokenizer.decode(row["input_ids"]) == f"<s>[INST] {asked} [/INST] {answer} </s>"
        learned = [label for label in row["labels"] if label != IGNORED]
        assert tiny_tokenizer.decode(learned) == f" {answer} </s>"


def test_rows_longer_than_max_length_are_cut_and_counted(build):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (5, 100, 200)]
    splits = build(rows, max_length=40, eval_fraction=0.01)
    assert max(len(row["input_ids"]) for row in splits.train.tokens) <= 40
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in splits.train.tokens)
    assert splits.train.num_cut + splits.valid.num_cut == 2
    assert splits.train.counts.num_unlabelled + splits.valid.counts.num_unlabelled == 0
    assert any("longer than dataset.max_length=40 and were cut" in note for note in splits.notes)


def test_cut_takes_the_end_and_leaves_the_beginning(build):
    rows = [{"prompt": "a", "completion": "b" * 100}] * 2
    whole, cut = (build(rows, max_length=n).train.tokens[0] for n in (1000, 40))
    assert cut["input_ids"] == whole["input_ids"][:40]
    assert cut["labels"] == whole["labels"][:40]


def test_rows_without_a_label_after_the_cut_are_dropped_and_counted(build):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (5, 5, 5, 100, 100)]
    splits = build(rows, max_length=40, eval_fraction=0.01)
    kept = [*splits.train.examples, *splits.valid.examples]
    assert splits.train.counts.num_unlabelled + splits.valid.counts.num_unlabelled == 2
    assert [len(example["messages"][0]["content"]) for example in kept] == [5, 5, 5]
    assert len(splits.train.examples) == len(splits.train.tokens)
    assert any("2 training rows had no token to learn after the cut and were left out" in n for n in splits.notes)


def test_data_that_fits_is_not_noted(build):
    assert build(CHATS).notes == []


def test_data_with_no_label_left_is_refused(build):
    with pytest.raises(DataError, match=r"No training row has a token to learn within dataset.max_length=8\. Type a l"):
        build(CHATS, max_length=8)


# Examples


def test_examples_are_as_a_list_would_hold_them(build):
    rows = [row | {"prompt": f"{row['prompt']} é🙂"} for row in CHATS]
    examples = build(rows, eval_fraction=0.25).train.examples
    whole = list(examples)
    assert len(examples) == len(whole) == 15
    assert [examples[i] for i in range(15)] == whole
    assert [examples[-1], examples[2:9:3], examples[:0]] == [whole[-1], whole[2:9:3], []]
    assert [*reversed(examples)] == whole[::-1]
    assert whole[3] in examples
    with pytest.raises(IndexError):
        examples[15]


def test_numbers_say_which_row_of_the_file_a_row_of_tokens_is(build):
    splits = build(CHATS, eval_fraction=0.25)
    assert splits.valid.numbers.tolist() == [3, 5, 7, 14, 20]
    long = [{"prompt": "a", "completion": "b" * 200} if i == 4 else row for i, row in enumerate(CHATS)]
    splits = build(long, max_length=100, long_rows=LongRows.split, seed=1)
    numbers = splits.train.numbers.tolist()
    assert numbers.count(5) == 3
    assert len(numbers) == len(splits.train.tokens) == len(splits.train.examples) + 2


# Lengths


LONG = [{"prompt": "a", "completion": "b" * n} for n in (5, 100, 5, 200, 5)]


@pytest.mark.parametrize("long_rows", LongRows)
def test_every_row_and_token_is_accounted_for(build, tiny_tokenizer, long_rows):
    whole = build(LONG, max_length=1000)
    splits = build(LONG, max_length=40, long_rows=long_rows)
    both = [splits.train, splits.valid]
    counts = [split.counts for split in both]
    heads = {LongRows.cut: "num_cut", LongRows.drop: "num_dropped", LongRows.split: "num_split"}
    assert sum(c.num_read for c in counts) == 5
    assert sum(getattr(c, heads[long_rows]) for c in counts) == 2
    assert sum(getattr(c, head) for c in counts for head in heads.values()) == 2
    assert [c.num_kept for c in counts] == [len(split.examples) for split in both]
    assert [c.num_pieces for c in counts] == [len(split.tokens) for split in both]
    assert [c.num_tokens for c in counts] == [sum(map(len, split.tokens["input_ids"])) for split in both]
    supervised = [sum(label != IGNORED for row in split.tokens["labels"] for label in row) for split in both]
    assert [c.num_supervised for c in counts] == supervised
    assert max(c.longest for c in counts) == max(whole.train.counts.longest, whole.valid.counts.longest)
    before = whole.train.counts.num_tokens + whole.valid.counts.num_tokens
    added = sum(c.num_pieces - c.num_kept for c in counts)  # a BOS each
    assert sum(c.num_tokens + c.num_tokens_cut for c in counts) == before + added
    assert any("longer than dataset.max_length=40" in note for note in splits.notes)


def test_split_rows_learn_what_whole_rows_do(build, tiny_tokenizer):
    splits, whole = build(LONG, max_length=40, long_rows=LongRows.split), build(LONG, max_length=1000)
    for split, reference in ((splits.train, whole.train), (splits.valid, whole.valid)):
        labels = [label for row in split.tokens["labels"] for label in row if label != IGNORED]
        assert labels == [label for row in reference.tokens["labels"] for label in row if label != IGNORED]
        assert {row[0] for row in split.tokens["input_ids"]} == {tiny_tokenizer.bos_token_id}
        assert all(row.count(tiny_tokenizer.bos_token_id) == 1 for row in split.tokens["input_ids"])


def test_data_of_long_rows_alone_cannot_be_dropped(build):
    with pytest.raises(DataError, match=r"within dataset.max_length=40\. Type a larger one, or dataset.long_rows=cut"):
        build([{"prompt": "a", "completion": "b" * 100}] * 4, max_length=40, long_rows=LongRows.drop)


# Rows that are left out


def test_empty_rows_are_left_out_and_counted_with_their_numbers(build):
    rows = copy.deepcopy(CHATS)
    for i in range(8):
        rows[i] = {"prompt": " ", "completion": None}
    splits = build(rows, eval_fraction=0.25)
    assert splits.train.counts.first["empty"] == [1, 2, 4, 6, 8]
    assert splits.valid.counts.first["empty"] == [3, 5, 7]
    assert len(splits.train.examples) == 10
    assert "5 training rows are empty and were left out" in splits.notes


def test_rows_that_are_bad_are_left_out_only_where_that_is_asked_for(build, tiny_tokenizer):
    rows = copy.deepcopy(CHATS)
    rows[0]["prompt"] = 7
    rows[7] = {"nothing": "of this"}
    with pytest.raises(
        DataError, match=r"row 1: column prompt holds int.* To leave such rows out, type dataset.skip_bad_rows=true"
    ):
        build(rows)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    refuse = "{% if messages[0]['content'] == 'number 10' %}{{ raise_exception('no tens') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    splits = build(rows, skip_bad_rows=True, eval_fraction=0.25, tokenizer=tokenizer)
    assert splits.train.counts.first["bad"] == [1, 8, 11]
    assert [fault.partition(": ")[2][:25] for fault in splits.train.counts.faults] == [
        "column prompt holds int w",
        "there is no column prompt",
        "the chat template refuses",
    ]
    assert splits.train.counts.num_bad == 15 - len(splits.train.examples) == 3
    assert any(
        "3 training rows cannot be used and were left out. The first: rows.jsonl, row 1" in n for n in splits.notes
    )


def test_questions_without_an_answer_are_left_out_and_counted(build):
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    splits = build([{"messages": chat}] * 4)
    assert splits.train.counts.num_trimmed == 3
    assert [len(example["messages"]) for example in splits.train.examples] == [2, 2, 2]
    assert any("3 training rows lost their last turn" in note for note in splits.notes)


def test_data_of_empty_and_bad_rows_alone_is_refused(build):
    empty = {"prompt": "", "completion": ""}
    with pytest.raises(DataError, match="No training row can be used: of 3, 3 are empty and 0 cannot"):
        build([empty] * 4)
    with pytest.raises(DataError, match=r"The first of them: rows.jsonl, row 1: column prompt holds int"):
        build([{"prompt": 1, "completion": "a"}] * 4, skip_bad_rows=True)


# Faults


@pytest.mark.parametrize("number", [1, 7, 20])
def test_bad_row_is_named_by_its_number_in_the_file(build, number):
    rows = copy.deepcopy(CHATS)
    rows[number - 1]["completion"] = ""
    with pytest.raises(DataError, match=rf"rows.jsonl, row {number}: column completion is empty"):
        build(rows, eval_fraction=0.3, format=DataFormat.prompt_completion)


def test_row_that_the_template_refuses_is_named(build, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    refuse = "{% if messages[0]['content'] == 'number 6' %}{{ raise_exception('no sixes') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    with pytest.raises(DataError, match="row 7: the chat template refuses this conversation: no sixes"):
        build(CHATS, tokenizer=tokenizer)


def test_answers_cannot_be_learned_from_plain_text(build):
    with pytest.raises(
        DataError, match=r"dataset.loss_on=completion needs rows with marked answers.*dataset.loss_on=all"
    ):
        build([{"text": "a b c"}] * 3, loss_on=LossOn.completion)


@pytest.mark.parametrize("form", list(DataFormat), ids=str)
def test_loss_is_on_the_last_answer_unless_the_rows_are_text(form):
    wanted = LossOn.all if form is DataFormat.text else LossOn.completion
    assert resolve_loss_on(LossOn.auto, form) is wanted
    assert resolve_loss_on(LossOn.all, form) is LossOn.all


# The fingerprint


def test_equal_data_has_an_equal_fingerprint(build):
    assert build(CHATS).fingerprint == build(copy.deepcopy(CHATS)).fingerprint


def test_what_does_not_change_tokens_does_not_change_the_fingerprint(build):
    renamed = [{"q": row["prompt"], "a": row["completion"]} for row in CHATS]
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in CHATS]
    as_chats = [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]
    assert build(CHATS).fingerprint == build(as_chats).fingerprint
    assert build(CHATS).fingerprint == build(renamed, columns=ColumnSettings(prompt="q", completion="a")).fingerprint
    assert build(CHATS).fingerprint == build(CHATS, loss_on=LossOn.completion).fingerprint


def changed(kind: str, tokenizer: Any) -> dict[str, Any]:
    rows, other = copy.deepcopy(CHATS), copy.deepcopy(tokenizer)
    if kind == "a letter":
        rows[3]["completion"] = "Answer 3"
    if kind == "the order of two rows":
        rows[3], rows[4] = rows[4], rows[3]
    if kind == "the template":
        other.chat_template = tokenizer.chat_template.replace("[/INST]", "[/INST]\n")
    kwargs = {
        "a system prompt": {"system_prompt": "Be brief."},
        "loss_on": {"loss_on": LossOn.all},
        "max_length": {"max_length": 32},
        "the number of rows": {"max_train_rows": 10},
        "the draw": {"seed": 1},
    }
    return {"rows": rows, "tokenizer": other} | kwargs.get(kind, {})


@pytest.mark.parametrize(
    "kind",
    [
        *("a letter", "the order of two rows", "the template", "a system prompt", "loss_on", "max_length"),
        *("the number of rows", "the draw"),
    ],
)
def test_fingerprint_changes_with(build, tiny_tokenizer, kind):
    assert build(**changed(kind, tiny_tokenizer)).fingerprint != build(CHATS).fingerprint


def test_fingerprint_tells_training_rows_from_held_out_ones(build):
    rows = [{"text": "same"}] * 4
    halves, quarters = (build(rows, eval_fraction=share) for share in (0.5, 0.25))
    assert [len(halves.train.tokens), len(quarters.train.tokens)] == [2, 3]
    assert halves.fingerprint != quarters.fingerprint


# The pad token


def tokenizer_folder(tokenizer: Any, folder: Path, **tokens: str | None) -> ModelSettings:
    """A tokenizer of the tiny model with other special tokens, saved as a model's folder holds it."""
    other = copy.deepcopy(tokenizer)
    for name, token in tokens.items():
        setattr(other, name, token)
    other.save_pretrained(folder)
    return ModelSettings(name=str(folder), chat_template="llama2")


def test_tiny_pads_with_unk_and_on_the_right(tiny_tokenizer):
    assert [tiny_tokenizer.pad_token, tiny_tokenizer.pad_token_id] == ["<unk>", 0]
    assert tiny_tokenizer.padding_side == "right"


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_pad_token_that_is_missing_or_the_eos_becomes_unk(tiny_tokenizer, tmp_path, pad):
    loaded = load_tokenizer(tokenizer_folder(tiny_tokenizer, tmp_path, pad_token=pad))
    assert loaded.pad_token == "<unk>"
    assert loaded.pad_token_id != loaded.eos_token_id


def test_own_pad_token_is_kept_and_another_can_be_named(tiny_tokenizer, tmp_path):
    model = tokenizer_folder(tiny_tokenizer, tmp_path, pad_token="A")
    assert load_tokenizer(model).pad_token == "A"
    model.pad_token = "B"
    assert load_tokenizer(model).pad_token == "B"


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_tokenizer_that_has_nothing_to_pad_with_is_refused(tiny_tokenizer, tmp_path, pad):
    model = tokenizer_folder(tiny_tokenizer, tmp_path, pad_token=pad, unk_token=None)
    with pytest.raises(ConfigError, match=r"it must not be the EOS </s>\. Type model.pad_token=TOKEN"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("pad", "said"), [("</s>", "must not be the EOS </s>"), ("<pad>", "model.pad_token=<pad> is not in the vocabulary")]
)
def test_pad_token_that_cannot_be_one_is_refused(tiny_tokenizer, tmp_path, pad, said):
    model = tokenizer_folder(tiny_tokenizer, tmp_path)
    model.pad_token = pad
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(model)


def test_no_token_is_added_to_the_vocabulary(tiny_tokenizer, tmp_path):
    assert len(load_tokenizer(tokenizer_folder(tiny_tokenizer, tmp_path, pad_token="</s>"))) == len(tiny_tokenizer)
