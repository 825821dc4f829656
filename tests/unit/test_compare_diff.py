"""The difference of two runs: settings, data, packages, code, results, and the curves."""

import copy

import pytest

from llama_lab.compare.diff import curves, diff, points, sections
from llama_lab.compare.find import find_runs
from llama_lab.errors import RunError

from .compare_runs import make_run, tiny_lock


def lock(**changes):
    return copy.deepcopy(tiny_lock()) | changes


@pytest.fixture
def pair(tmp_path):
    versions = tiny_lock()["versions"]
    one = lock(dataset={"fingerprint": "f1"}, versions=versions | {"peft": "0.1"}, code={"commit": "c1", "diff": ""})
    change = "--- a/x\n+++ b/x\n-old\n+new\n"
    other = lock(
        dataset={"fingerprint": "f2"}, versions=versions | {"peft": "0.2"}, code={"commit": "c1", "diff": change}
    )
    make_run(tmp_path / "a", 1.0, lock=one, lora__r=8)
    make_run(tmp_path / "b", 2.0, lock=other, lora__r=16, steps=6)
    return find_runs([tmp_path])[0]


def test_each_part_tells_what_differs_and_nothing_else(pair):
    found = dict(sections(*pair))
    assert found["Settings"] == [("lora.r", 8, 16)]
    assert found["Data"] == [("fingerprint", "f1", "f2")]
    assert found["Packages"] == [("peft", "0.1", "0.2")]
    assert [(key, one) for key, one, _ in found["Code"]] == [("uncommitted", "nothing")]
    assert found["Code"][0][2].startswith("2 lines (")
    assert ("eval_loss", "1", "2") in found["Results"]
    assert found["Hardware"] == []


def test_curves_of_both_stand_in_one_plot(pair):
    plot = curves(*pair, "train/loss", width=60, height=12)
    lines = plot.splitlines()
    assert len(lines) == 12
    assert "train/loss" in lines[0]
    assert any("a" in line.partition("┤")[2] for line in lines)
    assert any("b" in line.partition("┤")[2] for line in lines)
    assert "\x1b" not in plot
    assert curves(*pair, "train/nothing") == ""


def test_one_point_is_drawn_too(pair):
    assert "a" in curves(*pair, "eval/loss", width=60, height=12)


def test_diff_prints_all_of_it(pair, capsys):
    assert diff(pair[0].folder, pair[1].folder) == 0
    text = capsys.readouterr().out
    for word in ("lora.r", "fingerprint", "peft", "uncommitted", "eval_loss", "Hardware: no difference", "train/loss"):
        assert word in text


def test_a_folder_with_several_runs_is_one_message(pair):
    with pytest.raises(RunError, match=r"holds 2 runs, and diff takes one. Type one of them, such as .*/a$"):
        diff(pair[0].folder.parent, pair[0].folder)


def test_numbers_that_cannot_be_drawn_are_left_out(pair):
    a, b = pair
    lines = ['{"step": 1, "train/loss": 1e308}', '{"step": 2, "train/loss": -1e308}', '{"step": 3, "train/loss": 1.0}']
    (a.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert points(a, "train/loss") == ([3], [1.0])
    assert "train/loss" in curves(a, b, "train/loss")
