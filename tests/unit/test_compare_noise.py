"""A winner is called so only where it is outside the noise."""

import math
import os
import threading

import pytest

from llama_lab.compare.read import read_run
from llama_lab.compare.show import Options, comparison
from llama_lab.compare.table import as_json

from .compare_runs import make_run


def runs(top, **losses):
    """Runs of one rank by name, each with seeds 0, 1, ..."""
    for number, (name, values) in enumerate(losses.items()):
        for seed, value in enumerate(values):
            make_run(top / f"{name}{seed}", value, lora__r=number + 1, seed=seed)
    return comparison(Options(paths=[top]))


def test_runs_that_differ_only_in_their_seed_are_one_row(tmp_path):
    found = runs(tmp_path, a=[1.0, 1.2, 1.4], b=[2.0])
    first = found.rows[0]
    stat = first.numbers["eval_loss"]
    assert (first.name, first.n, stat.n, stat.mean) == ("a0 (+2)", 3, 3, pytest.approx(1.2))
    assert stat.sd == pytest.approx(0.2)
    assert first.value("seed") == "0,1,2"


def test_winner_outside_the_noise(tmp_path):
    found = runs(tmp_path, a=[1.0, 1.01, 0.99], b=[2.0, 2.01, 1.99], c=[3.0, 3.1])
    assert [row.verdict for row in found.rows] == ["winner", "worse", "worse"]
    assert found.verdict[0].startswith("The winner is a0 (+2): eval_loss 1 ± 0.01 (n=3) against 2 ± 0.01 (n=3) of b0")


def test_tied_within_noise_names_with_whom(tmp_path):
    found = runs(tmp_path, a=[1.0, 1.2, 1.4], b=[1.1, 1.3, 1.5], c=[9.0, 9.1, 9.2])
    assert [row.verdict for row in found.rows] == ["tied", "tied", "worse"]
    assert found.verdict == ["a0 (+2) is tied within noise with b0 (+2) (Welch's t test over seeds, p >= 0.05)."]


def test_of_one_seed_nothing_is_said(tmp_path):
    found = runs(tmp_path, a=[1.0], b=[1.1])
    assert [row.verdict for row in found.rows] == ["untested", "untested"]
    assert "nothing can be said of the noise" in found.verdict[0]
    assert "-m seed=1,2,3" in found.verdict[0]


def test_a_lucky_single_run_keeps_the_others_from_being_the_winner(tmp_path):
    found = runs(tmp_path, lucky=[0.5], a=[1.0, 1.01], b=[2.0, 2.01])
    assert [row.verdict for row in found.rows] == ["untested", "leads", "worse"]
    assert found.verdict[0].startswith("Of the rows with several seeds the best is a0")
    assert found.verdict[1] == "One seed alone, so not judged: lucky0."


def test_beside_a_row_with_one_seed_there_is_no_winner(tmp_path):
    found = runs(tmp_path, a=[1.0, 1.001], single=[1.002], b=[2.0, 2.01])
    assert [row.verdict for row in found.rows] == ["leads", "untested", "worse"]
    assert not any("winner" in line for line in found.verdict)


def test_the_same_seed_again_is_no_new_draw(tmp_path):
    for name, value in (("a", 1.0), ("again", 1.2), ("b", 3.0)):
        make_run(tmp_path / name, value, lora__r=2 if name == "b" else 1, seed=5)
    found = comparison(Options(paths=[tmp_path]))
    assert [(row.name, row.n, row.numbers["eval_loss"].values) for row in found.rows] == [
        ("a (+1)", 1, (1.1,)),
        ("b", 1, (3.0,)),
    ]


def test_what_made_a_trial_the_best_is_not_counted_again(tmp_path):
    make_run(tmp_path / "0", 0.1, seed=0)
    for seed in (1, 2):
        make_run(tmp_path / "confirm" / str(seed), 1.0, seed=seed)
    (row,) = comparison(Options(paths=[tmp_path])).rows
    assert len(row.runs) == 3
    assert row.numbers["eval_loss"].values == (1.0, 1.0)


def test_failed_runs_are_not_part_of_a_mean(tmp_path):
    make_run(tmp_path / "a", 1.0, seed=0)
    make_run(tmp_path / "b", 1.0, seed=1, status="failed")
    assert [(row.name, row.first.status) for row in comparison(Options(paths=[tmp_path])).rows] == [
        ("a", "ok"),
        ("b", "failed"),
    ]


def test_equal_values_are_a_tie(tmp_path):
    found = runs(tmp_path, a=[1.0, 1.0], b=[1.0, 1.0])
    assert [row.verdict for row in found.rows] == ["tied", "tied"]


def test_second_stages_are_one_row_over_seeds(tmp_path):
    for seed in (0, 1):
        first = make_run(tmp_path / f"of{seed}" / "1_sft", 1.0 + seed, seed=seed)
        make_run(
            tmp_path / f"of{seed}" / "2_dpo", 0.5 + seed, seed=seed, trainer__name="dpo", model__adapter=str(first)
        )
    # several seeds from one adapter are a row, too
    start = str(tmp_path / "of0" / "1_sft")
    for seed in (0, 1):
        make_run(tmp_path / f"again{seed}", seed=seed, trainer__name="dpo", model__adapter=start, trainer__beta=0.5)
    make_run(tmp_path / "itself", 3.0, trainer__name="dpo", model__adapter=str(tmp_path / "itself"))
    found = {row.name: row.n for row in comparison(Options(paths=[tmp_path])).rows}
    assert found == {"of0/1_sft (+1)": 2, "of0/2_dpo (+1)": 2, "again0 (+1)": 2, "itself": 1}


@pytest.mark.parametrize("seed", [[1], [[1], [2, {"x": None}]], {"a": 1}, None, math.nan, "a=b", 10**400], ids=str)
def test_whatever_stands_in_place_of_a_seed_is_a_seed_of_its_own(tmp_path, seed):
    make_run(tmp_path / "one", 1.0, seed=1)
    make_run(tmp_path / "odd", 2.0, seed=seed)
    make_run(tmp_path / "same", 4.0, seed=seed)
    found = comparison(Options(paths=[tmp_path], columns=["run", "seed", "n"]))
    if isinstance(seed, dict):  # settings of other names
        assert sorted(row.n for row in found.rows) == [1, 1]
    else:
        (row,) = found.rows
        assert row.n == 2
        assert row.numbers["eval_loss"].values == (3.0, 1.0)
    assert as_json(found.rows, found.columns, found.key, found.verdict)


def test_odd_values_are_compared_by_their_text(tmp_path):
    make_run(tmp_path / "list", 1.0, seed=[1])
    make_run(tmp_path / "text", 1.0, seed="a=b")
    make_run(tmp_path / "null", 1.0, seed=None)
    make_run(tmp_path / "number", 1.0, seed=1)

    def fitting(where):
        return [run.name for run in comparison(Options(paths=[tmp_path], where=where, sort="seed")).runs]

    assert fitting("seed=[1]") == ["list"]
    assert fitting('seed="a=b"') == ["text"]
    assert fitting("seed=null") == ["null"]
    assert fitting("seed>=1") == ["number"]
    assert fitting("seed in (1, 2)") == ["number"]


@pytest.mark.parametrize("start", [["x"], "a\0b", "x" * 5000, {"a": 1}], ids=["list", "nul", "long", "dict"])
def test_any_text_may_stand_where_a_run_began(tmp_path, start):
    make_run(tmp_path / "run", 1.0, model__adapter=start)
    make_run(tmp_path / "other", 2.0)
    assert len(comparison(Options(paths=[tmp_path])).rows) == 2


def test_hardware_that_is_no_list_is_shown_as_it_is(tmp_path):
    make_run(tmp_path / "run", 1.0, lock={"hardware": {"gpus": 5}})
    found = comparison(Options(paths=[tmp_path], columns=["gpu"]))
    assert [row.value("gpu") for row in found.rows] == [5]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("run.json", "broken"),
        ("result.json", "broken"),
        ("metrics.jsonl", "broken"),
        ("samples.md", "ok"),
        (".hydra/hydra.yaml", "ok"),
        (".lock", "interrupted"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name, status):
    folder = make_run(tmp_path / "run", None if status == "interrupted" else 1.0)
    (folder / ".hydra").mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    found = []

    def read():
        run = read_run(folder, "run")
        found.append((run.status, run.samples(), run.metrics(), run.choices))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert [one for one, *_ in found] == [status]
