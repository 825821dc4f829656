"""The embedded data set: the shipped files are what the words and the config tree give, and every answer is right."""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from llama_lab.compose import compose_words
from llama_lab.data import sample
from llama_lab.errors import ConfigError
from llama_lab.paths import CONF_DIR

GROUPS = ("model", "dataset", "quant")
NUM_ROWS_READ = 264  # dataset.max_train_rows of conf/dataset/sample.yaml


def shipped(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in sample.path_of(split).read_text(encoding="utf-8").splitlines()]


def answer_words(row: dict[str, str]) -> list[str]:
    assert row["completion"].startswith(f"{sample.COMMAND} ")
    return row["completion"].removeprefix(sample.COMMAND).split()


def pattern_of(frame: str) -> re.Pattern[str]:
    """What a frame's prompts look like: its own text, one of the models' words, and anything as settings."""
    models = [word for words in sample.SETTINGS["model"].values.values() for word in words]
    text = re.escape(frame).replace(r"\ ", " ?")  # the space before {settings} goes where no setting is said
    text = text.replace(r"\{model\}", f"(?:{'|'.join(map(re.escape, models))})")
    return re.compile(re.sub(r"\\{(settings|list)\\}", ".*", text), re.IGNORECASE)


@pytest.fixture
def conf_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONF_DIR, tmp_path / "conf"))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_shipped_file_is_what_build_gives(split):
    assert sample.path_of(split).read_bytes() == sample.to_jsonl(sample.build()[split]).encode()


def test_there_are_rows_enough():
    assert len(shipped("train")) >= 600
    assert len(shipped("valid")) == 48


def test_no_prompt_comes_twice():
    prompts = [row["prompt"].lower() for split in ("train", "valid") for row in shipped(split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(("frames_of", "rows_of"), [("train", "valid"), ("valid", "train")])
def test_splits_share_no_sentence_frame(frames_of, rows_of):
    foreign = [pattern_of(frame) for frame in sample.FRAMES[frames_of]]
    own = [pattern_of(frame) for frame in sample.FRAMES[rows_of]]
    for row in shipped(rows_of):
        assert any(pattern.fullmatch(row["prompt"]) for pattern in own), row
        assert not any(pattern.fullmatch(row["prompt"]) for pattern in foreign), row


def test_answers_name_the_model_first_and_only_say_what_was_asked():
    for row in shipped("train") + shipped("valid"):
        chosen = dict(word.split("=", 1) for word in answer_words(row))
        assert next(iter(chosen)) == "model", row
        for key, value in chosen.items():
            words = sample.SETTINGS[key].values[value]
            assert any(word.lower() in row["prompt"].lower() for word in words), (key, row)


def test_same_words_never_mean_two_things():
    for key, setting in sample.SETTINGS.items():
        words = Counter(word.lower() for said in setting.values.values() for word in set(map(str.lower, said)))
        assert max(words.values()) == 1, key


def test_rows_that_the_default_run_reads_hold_every_choice_and_word():
    rows = shipped("train")[:NUM_ROWS_READ]
    counts = Counter(word for row in rows for word in answer_words(row))
    text = "\n".join(row["prompt"].lower() for row in rows)
    for key, setting in sample.SETTINGS.items():
        for value, words in setting.values.items():
            assert counts[f"{key}={value}"] >= 5, f"{key}={value}"
            assert all(text.count(word.lower()) >= 3 for word in words), words


@pytest.mark.parametrize("split", ["valid", pytest.param("train", marks=pytest.mark.slow)])
def test_answers_with_every_pair_of_settings_compose(split):
    answers, seen = {tuple(answer_words(row)) for row in shipped(split)}, set()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        for words in sorted(answers, key=len, reverse=True):
            pairs = set(itertools.combinations(sorted(words), min(2, len(words))))
            if pairs - seen:
                compose_words(list(words))
            seen |= pairs


@pytest.mark.parametrize("group", GROUPS)
def test_choice_without_words_is_an_error(conf_copy, group):
    (conf_copy / group / "brand_new.yaml").write_text("name: brand_new\n")
    with pytest.raises(ConfigError, match=f"{group}=brand_new .*has no words"):
        sample.build(conf_copy)


@pytest.mark.parametrize(("group", "choice"), [("quant", "fp4"), ("dataset", "jsonl"), ("model", "llama2_7b")])
def test_words_without_choice_are_an_error(conf_copy, group, choice):
    (conf_copy / group / f"{choice}.yaml").unlink()
    with pytest.raises(ConfigError, match=f"words for {group}={choice}, which"):
        sample.build(conf_copy)
