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
    import render_speed

    rows = json.loads((ROOT / "benchmarks" / "results" / "stacked.json").read_text())["rows"]
    rows = [row for row in rows if row["system"] in ("stack", "one after the other")]
    case = rows[0]["case"]
    stack = next(row for row in rows if row["system"] == "stack" and row["case"] == case)
    trl = stack | {"system": "trl, one by one", "tokens_per_s": stack["tokens_per_s"] / 20}
    beside = stack | {"system": "7 of 8 processes side by side", "tokens_per_s": stack["tokens_per_s"] / 2}
    file = tmp_path / "stacked.json"
    monkeypatch.setattr(render_speed, "STACKED", file)
    assert render_speed.stacked_table() == ""
    for added, columns in (([], 0), ([trl], 1), ([trl, beside], 2)):
        file.write_text(json.dumps({"rows": rows + added}))
        lines = [line for line in render_speed.stacked_table().splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {7 + columns}
    assert f"{trl['tokens_per_s']:,.0f} (20.0x) | 7 of 8 ran: {beside['tokens_per_s']:,.0f} (2.0x) |" in lines[2]
    assert lines[3].count("not measured") == 2


def test_a_whole_study_is_shown_once_it_is_measured(tmp_path, monkeypatch):
    import pictures_study
    import render_study

    file = tmp_path / "study.json"
    monkeypatch.setattr(render_study, "STUDY", file)
    assert render_study.study_section() == ""
    file.write_text(json.dumps({"rows": [STACKED, WHOLE]}))
    page = render_study.study_section()
    assert (
        "| 3 points | stacked, successive halving | abc | 1 done, 2 pruned | 13 | 50 s (3.00x as fast) | 2.1000 |"
        in page
    )
    assert "| 3 points | one by one, whole | abc | 3 done | 27 | 2 min 30 s | 2.0000 |" in page
    assert "winner is number 2 of 3 among the points trained whole (2.1000 there, 2.0000 the best" in page
    assert "Aimed at" not in page
    drawn = pictures_study.picture(STACKED, WHOLE)
    assert drawn.count("<circle") == 3
    assert "3.00 times as fast" in drawn
    assert "times as fast" not in pictures_study.picture(STACKED, None)


@pytest.mark.parametrize(("seconds", "best", "said"), [(25, 0, "reached"), (26, 0, "missed"), (25, 1, "missed")])
def test_what_was_aimed_at_is_told_beside_the_study(tmp_path, monkeypatch, seconds, best, said):
    import render_study

    case = {"case": "512 tokens, 3 points"}
    winner = {"winner": WHOLE["record"][best]}
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": [STACKED | case | winner | {"makespan_s": seconds}, WHOLE | case]}))
    monkeypatch.setattr(render_study, "STUDY", file)
    assert f"and the same winner ({said}: {150 / seconds:.2f} times)" in render_study.study_section()


def test_points_trained_whole_elsewhere_tell_the_winner_and_not_the_time(tmp_path, monkeypatch):
    import render_study

    file = tmp_path / "study.json"
    file.write_text(json.dumps({"rows": [STACKED, WHOLE | {"card": "none; some CPU", "cpus": 2}]}))
    monkeypatch.setattr(render_study, "STUDY", file)
    page = render_study.study_section()
    assert "winner is number 2 of 3" in page
    assert "Those were trained on a CPU with 2 cores." in page
    assert "as fast" not in page.split("| 3 points")[1]


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
