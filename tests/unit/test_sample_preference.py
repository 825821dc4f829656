"""The embedded preferences: the shipped files are what is built, and each wrong command does something else."""

import json

import pytest

from llama_lab.compose import compose_words
from llama_lab.data import sample, sample_preference


def shipped(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in sample_preference.path_of(split).read_text(encoding="utf-8").splitlines()]


def settings_of(command: str):
    return compose_words(command.removeprefix(sample.COMMAND).split())


@pytest.mark.parametrize("split", ["train", "valid"])
def test_shipped_file_is_what_build_gives(split):
    built = sample.to_jsonl(sample_preference.build_pairs()[split])
    assert sample_preference.path_of(split).read_bytes() == built.encode()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_requests_and_right_commands_are_those_of_sample(split):
    right = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in shipped(split)]
    assert right == sample.build()[split]


def test_wrong_commands_compose_another_run():
    for row in shipped("valid"):
        assert settings_of(row["chosen"]) != settings_of(row["rejected"]), row


def test_every_mistake_comes_up():
    lengths = [len(row["rejected"].split()) - len(row["chosen"].split()) for row in shipped("train")]
    assert {length: lengths.count(length) > 50 for length in (-1, 0, 1)} == {-1: True, 0: True, 1: True}
