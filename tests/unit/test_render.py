"""The tables that docs/render.py makes of results that are not there yet, or have systems that others lack."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def docs_are_importable():
    sys.path.insert(0, str(ROOT / "docs"))
    yield
    sys.path.remove(str(ROOT / "docs"))


def test_stacks_stand_beside_what_else_was_measured_of_their_case(tmp_path, monkeypatch):
    import render_stacked

    rows = json.loads((ROOT / "benchmarks" / "results" / "stacked.json").read_text())["rows"]
    rows = [row for row in rows if row["system"] in ("stack", "one after the other")]
    case = rows[0]["case"]
    stack = next(row for row in rows if row["system"] == "stack" and row["case"] == case)
    trl = stack | {"system": "trl, one by one", "tokens_per_s": stack["tokens_per_s"] / 20}
    beside = stack | {"system": "7 of 8 processes side by side", "tokens_per_s": stack["tokens_per_s"] / 2}
    file = tmp_path / "stacked.json"
    monkeypatch.setattr(render_stacked, "STACKED", file)
    assert render_stacked.stacked_table() == ""
    for added, columns in (([], 0), ([trl], 1), ([trl, beside], 2)):
        file.write_text(json.dumps({"rows": rows + added}))
        lines = [line for line in render_stacked.stacked_table().splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {7 + columns}
    assert f"{trl['tokens_per_s']:,.0f} (20.0x) | 7 of 8 ran: {beside['tokens_per_s']:,.0f} (2.0x) |" in lines[2]
    assert lines[3].count("not measured") == 2
    processes = beside | {"case": case.partition(",")[0], "memory": "balanced"}
    file.write_text(json.dumps({"rows": [*rows, processes]}))
    assert f"7 of 8 ran: {beside['tokens_per_s']:,.0f} (2.0x, `balanced`) |" in render_stacked.stacked_table()


def test_a_stack_is_told_beside_one_run_of_as_many_tokens(tmp_path, monkeypatch):
    import render_stacked

    rows = json.loads(render_stacked.STACKED.read_text())["rows"]
    alone = next(row for row in rows if row["system"] == "one after the other")
    run = {
        "case": "rank 32",
        "card": alone["card"],
        "tokens_per_step": alone["tokens_per_step"],
        "settings": ["lora.r=32"],
    }
    file = tmp_path / "sweep.json"
    monkeypatch.setattr(render_stacked, "SWEEP", file)
    assert "one run of as many tokens" not in render_stacked.stacked_table()
    for more, is_said in (({}, True), ({"card": "another"}, False), ({"tokens_per_step": 8192}, False)):
        file.write_text(json.dumps({"rows": [run | {"tokens_per_s": 1.5 * alone["tokens_per_s"]} | more]}))
        assert ("1.50 times one by one." in render_stacked.stacked_table()) is is_said


def test_a_whole_study_is_shown_once_it_is_measured(tmp_path, monkeypatch):
    import pictures_study
    import render_study

    file = tmp_path / "study.json"
    monkeypatch.setattr(render_study, "STUDY", file)
    assert render_study.study_section() == ""
    file.write_text(json.dumps({"rows": [STACKED, WHOLE]}))
    page = render_study.study_section()
    stacked = "| 3 points | stacked, successive halving | a card | abc | 1 done, 2 pruned | 13 | 50 s (3.00x as fast)"
    assert f"{stacked} | 2.1000 |" in page
    assert "| 3 points | one by one, whole | a card | abc | 3 done | 27 | 2 min 30 s | 2.0000 |" in page
    found = "number 2 of 3 among the points trained whole (2.1000 there, 2.0000 the best, 2.4000 the worst)"
    assert f"its winner is another (missed: {found})" in page
    page = page_of([STACKED | {"winner": WHOLE["record"][0]}, WHOLE], tmp_path, monkeypatch)
    assert "its winner is the same (reached: number 1 of 3" in page
    drawn = pictures_study.picture(STACKED, WHOLE)
    assert drawn.count("<circle") == 3
    assert "3.00 times as fast" in drawn
    assert "times as fast" not in pictures_study.picture(STACKED, None)


@pytest.mark.parametrize(("seconds", "said"), [(25, "6.00 times as fast (reached"), (26, "5.77 times as fast (missed")])
def test_what_was_aimed_at_is_told_beside_the_study(tmp_path, monkeypatch, seconds, said):
    assert said in page_of([STACKED | {"makespan_s": seconds}, WHOLE], tmp_path, monkeypatch)


def test_one_by_one_is_of_the_same_card_and_rather_of_the_same_commit(tmp_path, monkeypatch):
    each = {"system": "one by one, whole: one of each", "trials": {"done": 1}, "winner": None}
    each |= {"record": [trial(0, "done", 9, 2.3, [])], "run_s": [50.0]}
    later = {"commit": "def"}
    rows = [STACKED | later, WHOLE, WHOLE | later | each | {"makespan_s": 200.0}]
    page = page_of(rows, tmp_path, monkeypatch)
    assert "4.00 times as fast" in page
    assert "number 2 of 3" in page
    other = {"card": "another card"}
    page = page_of([STACKED, WHOLE | other, WHOLE | each | later], tmp_path, monkeypatch)
    assert "3.00 times as fast" in page
    assert "among the points trained whole on another card" in page


def test_a_study_that_began_with_compiled_kernels_is_not_held_against_runs_that_compiled(tmp_path, monkeypatch):
    page = page_of([STACKED, STACKED | {"case": "3 points, kernels compiled"}, WHOLE], tmp_path, monkeypatch)
    assert "- 3 points, kernels compiled, on a card: its winner is another (missed: number 2 of 3" in page


def test_points_trained_whole_elsewhere_tell_the_winner_and_not_the_time(tmp_path, monkeypatch):
    page = page_of([STACKED, WHOLE | {"card": "none; some CPU", "cpus": 2}], tmp_path, monkeypatch)
    assert "number 2 of 3 among the points trained whole on a CPU with 2 cores" in page
    assert "as fast" not in page.split("| 3 points")[1]


def test_times_that_say_nothing_are_left_out_and_notes_are_told_once(tmp_path, monkeypatch):
    told = {"makespan_s": None, "note": "The cores were shared."}
    page = page_of([STACKED, WHOLE | told | {"card": "none; some CPU", "cpus": 2}], tmp_path, monkeypatch)
    assert "| a CPU with 2 cores | abc | 3 done | 27 | - | 2.0000 |" in page
    assert page.count("On a CPU with 2 cores: the cores were shared.") == 1
    page = page_of([STACKED, WHOLE | told], tmp_path, monkeypatch)
    assert "number 2 of 3" in page
    assert "times as fast (" not in page


def test_a_picture_of_runs_that_stand_for_others_has_one_bar():
    import pictures_study

    whole, each = (pictures_study.picture(STACKED, WHOLE | {"run_s": run_s}) for run_s in ([50.0] * 3, [50.0]))
    assert whole.count("<rect") == each.count("<rect") + 2
    assert "one by one, 3 whole runs, by one of each base" in each


def page_of(rows, folder, monkeypatch):
    """What docs/stacked.md has of these rows."""
    import render_study

    file = folder / "study.json"
    file.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(render_study, "STUDY", file)
    return render_study.study_section()


def trial(number, state, steps, loss, curve):
    return {"number": number, "state": state, "num_steps": steps, "loss": loss, "curve": curve, "point": {}}


SHARED = {
    "case": "3 points",
    "commit": "abc",
    "card": "a card",
    "versions": {"torch": "2"},
    "command": "python -m benchmarks.study",
}
DONE = trial(1, "done", 9, 2.1, [[3, 2.5], [9, 2.1]])
STACKED = SHARED | {
    "system": "stacked, successive halving",
    "makespan_s": 50.0,
    "optimizer_steps": 13,
    "trials": {"done": 1, "pruned": 2},
    "winner": DONE,
    "record": [trial(0, "pruned", 3, None, [[3, 2.6]]), DONE, trial(2, "pruned", 1, None, [[1, float("nan")], [1, 3]])],
}
WHOLE = SHARED | {
    "system": "one by one, whole",
    "makespan_s": 150.0,
    "measured": "a sum",
    "run_s": [50.0, 50.0, 50.0],
    "optimizer_steps": 27,
    "trials": {"done": 3},
    "winner": trial(0, "done", 9, 2.0, []),
    "record": [trial(0, "done", 9, 2.0, []), DONE, trial(2, "done", 9, 2.4, [])],
}
