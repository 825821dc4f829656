"""Tokens are made once, and never taken for those of other data: whatever they depend on makes new ones."""

import copy
import json
import os
import shutil
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from llama_lab.choices import DataFormat, LongRows, LossOn
from llama_lab.data.cache import (
    LATER_SETTINGS,
    LOST_AFTER_S,
    PLACE,
    cached,
    code_digest,
    digest,
    settings_without,
    tokenizer_digest,
)
from llama_lab.data.splits import Splits, build_splits
from llama_lab.dataset_config import ColumnSettings, DatasetSettings
from llama_lab.embedded import cache_dir
from llama_lab.errors import DataError

ROWS = [{"prompt": f"number {i}", "completion": f"answer {i}", "q": "a", "a": "b"} for i in range(20)]


@pytest.fixture
def cache(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def build(tmp_path, tiny_tokenizer, cache):
    """build(rows, tokenizer=..., seed=0, **dataset settings): the splits of a file that is always called the same."""

    def build(rows: Any = ROWS, *, tokenizer: Any = tiny_tokenizer, seed: int = 0, **kwargs: Any) -> Splits:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_splits(DatasetSettings(path=str(path), **kwargs), tokenizer, seed=seed)

    return build


def made(cache: Path, kind: str = "") -> set[str]:
    return {folder.name for folder in cache.glob(f"{kind}*")}


# What is taken from the cache


def test_second_run_makes_nothing_and_reads_the_same(build, cache):
    first = build(max_length=30)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = build(max_length=30)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert second.fingerprint == first.fingerprint
    for one, other in ((first.train, second.train), (first.valid, second.valid)):
        assert list(one.examples) == list(other.examples)
        assert one.tokens.to_list() == other.tokens.to_list()
        assert one.counts == other.counts
    assert second.notes == first.notes != []


def test_second_run_does_not_read_a_row(build, cache, tmp_path):
    kept = build().train.examples[0]
    (folder,) = cache.glob("examples-*")
    # what stands in the cache is what the run gets: nothing is converted again
    content = (folder / "examples.arrow").read_bytes()
    assert kept["messages"][0]["content"].encode() in content
    (folder / "examples.arrow").write_bytes(content.replace(b"number", b"NUMBER"))
    assert build().train.examples[0]["messages"][0]["content"].startswith("NUMBER")


def test_tokens_are_memory_mapped(build):
    splits = build()
    for split in (splits.train, splits.valid):
        (file,) = split.tokens.cache_files
        assert Path(file["filename"]).is_file()
        assert split.tokens.column_names == ["input_ids", "labels"]


@pytest.mark.parametrize(
    "kwargs",
    [{"packing": True}, {"pad_to_multiple_of": 8}, {"metrics": ["exact_match"]}, {"loss_on": LossOn.completion}],
    ids=str,
)
def test_what_changes_no_token_makes_no_new_ones(build, cache, kwargs):
    build()
    before = made(cache)
    build(**kwargs)
    assert made(cache) == before


def test_other_lengths_are_tokenised_from_the_rows_that_were_read(build, cache):
    build()
    build(max_length=32)
    assert [len(made(cache, kind)) for kind in ("examples", "tokens")] == [1, 2]


def test_padding_of_a_batch_makes_no_new_tokens(build, cache, tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    build(tokenizer=other)
    before = made(cache)
    other(["a", "bcd"], padding=True, truncation=True, max_length=3)
    build(tokenizer=other)
    assert made(cache) == before


# What is not


def test_file_with_other_content_and_the_same_look_is_read_again(build, cache, tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    first = build()
    was = path.stat()
    changed = copy.deepcopy(ROWS)
    changed[3]["completion"] = "answer 4"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    again = build_splits(DatasetSettings(path=str(path)), tiny_tokenizer, seed=0)
    assert again.fingerprint != first.fingerprint
    assert [len(made(cache, kind)) for kind in ("examples", "tokens")] == [2, 2]


def changed_tokenizer(tokenizer: Any, kind: str) -> Any:
    other = copy.deepcopy(tokenizer)
    if kind == "template":
        other.chat_template = tokenizer.chat_template.replace("[/INST]", "[/INST]\n")
    if kind == "a comment in the template":
        other.chat_template = tokenizer.chat_template + "{# #}"
    if kind == "eos":
        other.eos_token = "A"
    if kind == "bos":
        other.bos_token = "B"
    if kind == "an added token":
        other.add_tokens(["number"])
    if kind == "normaliser":
        from tokenizers import normalizers

        other.backend_tokenizer.normalizer = normalizers.Lowercase()
    return other


@pytest.mark.parametrize(
    "kind", ["template", "a comment in the template", "eos", "bos", "an added token", "normaliser"]
)
def test_tokenizer_with_another(build, cache, tiny_tokenizer, kind):
    other = changed_tokenizer(tiny_tokenizer, kind)
    assert tokenizer_digest(other) != tokenizer_digest(tiny_tokenizer)
    assert tokenizer_digest(copy.deepcopy(tiny_tokenizer)) == tokenizer_digest(tiny_tokenizer)
    if kind == "eos":
        return  # the template of tiny no longer fits it
    build()
    before = made(cache)
    build(tokenizer=other)
    assert len(made(cache) - before) == 1
    assert made(cache, "examples") <= before


OTHER_SETTINGS = {
    "eval_fraction": 0.5,
    "format": DataFormat.prompt_completion,
    "columns": ColumnSettings(prompt="q", completion="a"),
    "system_prompt": "Be brief.",
    "skip_bad_rows": True,
    "max_train_rows": 5,
    "max_eval_rows": 1,
    "max_length": 33,
    "long_rows": LongRows.split,
    "loss_on": LossOn.all,
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_setting_makes_other_tokens(build, cache, name):
    build(eval_fraction=0.1)
    before = made(cache)
    build(**({"eval_fraction": 0.1} | {name: OTHER_SETTINGS[name]}))
    assert len(made(cache, "tokens") - before) == 1


def test_other_seed_draws_other_rows_from_the_same_examples(build, cache):
    build(seed=0)
    build(seed=1)
    assert [len(made(cache, kind)) for kind in ("examples", "tokens")] == [1, 2]


def test_setting_that_is_new_counts():
    """Each is known to change nothing, or to say where the rows are; or it is in the name of what is kept."""
    dataset = DatasetSettings(path="rows.jsonl")
    counted = settings_without(dataset, *LATER_SETTINGS)
    assert set(counted) == {field.name for field in fields(DatasetSettings)} - set(PLACE) - set(LATER_SETTINGS)
    assert digest(counted) != digest(settings_without(replace(dataset, max_length=9), *LATER_SETTINGS))
    assert digest(counted) == digest(settings_without(replace(dataset, path="other"), *LATER_SETTINGS))


def test_code_that_makes_tokens_counts(tmp_path, monkeypatch):
    from llama_lab.data import cache as module

    folder = Path(shutil.copytree(Path(module.__file__).parent, tmp_path / "data"))
    monkeypatch.setattr(module, "__file__", str(folder / "cache.py"))
    digests = []
    for name in ("", "templates.py", "sample.py", "new_step.py"):
        if name:
            with (folder / name).open("a") as code:
                code.write("# changed\n")
        digests.append(code_digest.__wrapped__())
    assert digests[0] != digests[1] == digests[2] != digests[3]


# Whole or not at all


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "meta.json"}


def test_failure_leaves_nothing_behind(cache):
    def make(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise DataError("no more rows")

    with pytest.raises(DataError, match="no more rows"):
        cached("rows", "key", make)
    assert list(cache.iterdir()) == []


def test_two_that_make_the_same_at_once_agree(cache):
    both_are_making, found = threading.Barrier(2), []

    def make(folder: Path) -> dict[str, Any]:
        both_are_making.wait(timeout=10)
        (folder / "rows").write_text("the rows")
        return {"num": 3}

    threads = [threading.Thread(target=lambda: found.append(cached("rows", "key", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(cache / "rows-key", {"num": 3})] * 2
    assert contents(cache / "rows-key") == {"rows": "the rows"}
    assert made(cache) == {"rows-key"}


@pytest.mark.parametrize("damage", ["a file is gone", "a file is short", "meta.json is gone", "meta.json is torn"])
def test_folder_that_is_not_whole_is_made_again(cache, damage):
    def make(folder: Path) -> dict[str, Any]:
        (folder / "rows").write_text("the rows")
        return {"num": 3}

    folder, _ = cached("rows", "key", make)
    file = folder / ("rows" if "a file" in damage else "meta.json")
    if "gone" in damage:
        file.unlink()
    else:
        file.write_text(file.read_text()[:5])
    assert cached("rows", "key", make) == (folder, {"num": 3})
    assert contents(folder) == {"rows": "the rows"}


def test_what_a_killed_run_left_is_cleared_away_in_time(cache):
    old, young = cache / ".tokens-old", cache / ".tokens-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    lost = time.time() - LOST_AFTER_S - 60
    os.utime(old, (lost, lost))
    cached("rows", "key", lambda folder: {})
    assert (old.exists(), young.exists()) == (False, True)


def test_cache_that_cannot_be_written_says_how_to_name_another(tmp_path, build, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written: Not a directory\. Set LLAMA_LAB_CACHE to another"):
        build()


def test_cache_lies_beside_the_embedded_models(cache):
    folder, _ = cached("rows", "key", lambda folder: {})
    assert folder.parent.parent == cache_dir()
