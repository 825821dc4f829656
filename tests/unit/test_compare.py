"""Runs of every kind become one ranked table; none is dropped, whatever its files hold."""

import csv
import fcntl
import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from llama_lab.compare.find import find_runs
from llama_lab.compare.page import write_page
from llama_lab.compare.read import one_line
from llama_lab.compare.show import Options, comparison
from llama_lab.compare.table import as_csv, as_json, as_markdown
from llama_lab.errors import ConfigError, RunError

from .compare_runs import make_run


def compared(*paths, **options):
    return comparison(Options(paths=list(paths), **options))


def names(found):
    return [row.name for row in found.rows]


def test_runs_are_found_in_and_below_any_folder_each_once(tmp_path):
    one = make_run(tmp_path / "a" / "day" / "run")
    make_run(tmp_path / "study" / "10", lora__r=4)
    make_run(tmp_path / "study" / "9", lora__r=8)
    make_run(tmp_path / "study" / "9" / "winner", lora__r=2)  # a run in a run's folder
    (one / "checkpoints" / "x").mkdir(parents=True)
    (one / "checkpoints" / "x" / "run.json").write_text("{}")
    (tmp_path / "study" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    runs, unread = find_runs([one, tmp_path, tmp_path / "study"])
    assert [run.name for run in runs] == ["a/day/run", "study/9", "study/9/winner", "study/10"]
    assert unread == []


def test_what_did_not_end_well_is_shown_as_such(tmp_path):
    make_run(tmp_path / "ok", 1.0)
    make_run(tmp_path / "failed", 1.0, status="failed", error="ValueError: \x1b[31mred\nmany lines")
    make_run(tmp_path / "pruned", 1.0, status="pruned", error="worse than half", result={"num_steps": 3})
    make_run(tmp_path / "infeasible", 1.0, status="infeasible", error="CUDA out of memory")
    make_run(tmp_path / "killed", None)
    (tmp_path / "never" / ".hydra").mkdir(parents=True)
    statuses = {row.name: row.first.status for row in compared(tmp_path).rows}
    assert statuses == {
        "ok": "ok",
        "failed": "failed",
        "pruned": "pruned",
        "infeasible": "infeasible",
        "killed": "interrupted",
        "never": "failed",
    }
    notes = {row.name: row.value("note") for row in compared(tmp_path).rows}
    assert notes["failed"] == "ValueError: [31mred many lines"
    assert notes["infeasible"] == "CUDA out of memory"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr'),
        ("metrics.jsonl", '{"step": 1}'),
        ("result.json", '{"schema": 1, "status": "o'),
        ("result.json", ""),
        ("result.json", "[1]"),
        ("result.json", '{"schema": 1, "status": "dreaming"}'),
        ("result.json", "[" * 100_000),
        ("run.json", '{"config": {"lora":'),
        ("run.json", '{"config": []}'),
        ("run.json", b"\xff\xfe\x00"),
    ],
)
def test_files_that_are_not_whole_make_a_broken_run_and_stop_nothing(tmp_path, file, content):
    make_run(tmp_path / "good", 1.0)
    broken = make_run(tmp_path / "broken", 0.5)
    (broken / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = compared(tmp_path)
    assert [(row.name, row.first.status, row.rank) for row in found.rows] == [
        ("good", "ok", 1),
        ("broken", "broken", None),
    ]
    assert found.rows[1].value("note")


def test_odd_numbers_are_no_numbers(tmp_path):
    make_run(tmp_path / "a", 1.0, result={"objective": None, "eval_loss": "low", "tokens_per_s": True})
    make_run(tmp_path / "b", 2.0, result={"peak_memory_gib": 10**400})
    found = compared(tmp_path)
    assert [(row.name, row.rank) for row in found.rows] == [("b", 1), ("a", None)]
    assert "no finite number" in found.rows[1].value("note")
    assert "peak_memory_gib" not in found.rows[0].numbers


def test_a_run_at_work_is_running_until_its_process_lets_go(tmp_path):
    folder = make_run(tmp_path / "run", None)
    (folder / "metrics.jsonl").write_text('{"step": 1, "tr')  # it is being written
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_runs([folder])[0][0].status == "running"
    assert find_runs([folder])[0][0].status == "broken"


def test_a_trial_beyond_a_limit_of_its_study_is_infeasible(tmp_path):
    make_run(tmp_path / "0", 1.0)
    make_run(tmp_path / "1", 0.5)
    (tmp_path / "trials.csv").write_text("trial,state,error\n0,done,\n1,infeasible,peak_memory_gib 30 > 24\n")
    found = compared(tmp_path)
    assert [(row.name, row.first.status) for row in found.rows] == [("0", "ok"), ("1", "infeasible")]
    assert "30 > 24" in found.rows[1].value("note")


def test_only_the_settings_that_differ_are_shown(tmp_path):
    make_run(tmp_path / "a", 1.0, lora__r=8, quant__type="nf4", tracking__name="one", trainer__save_steps=1)
    make_run(tmp_path / "b", 2.0, lora__r=16, quant__type="fp4", tracking__name="two", trainer__save_steps=2)
    assert compared(tmp_path).columns.settings == ["lora.r", "quant.type"]


def test_what_a_group_brings_is_named_once(tmp_path):
    from llama_lab.compare.rows import companions

    make_run(tmp_path / "a", 1.0, model__name="x", model__pad_token="p")
    make_run(tmp_path / "b", 2.0, model__name="y", model__pad_token="q")
    found = compared(tmp_path)
    assert companions(found.rows, found.columns.settings) == {"model.name": ["model.pad_token"]}


def test_ranked_by_the_objective_the_good_end_first(tmp_path):
    for name, share in (("a", 0.1), ("b", 0.9), ("c", 0.5)):
        result = {"objective": share, "exact_match": share}
        make_run(tmp_path / name, share, objective="exact_match", lora__r=len(name) + ord(name), result=result)
    assert names(compared(tmp_path)) == ["b", "c", "a"]
    assert names(compared(tmp_path, sort="eval_loss")) == ["a", "c", "b"]
    assert names(compared(tmp_path, sort="eval_loss", reverse=True)) == ["b", "c", "a"]
    assert names(compared(tmp_path, sort="lora.r")) == ["a", "b", "c"]


@pytest.fixture
def stages(tmp_path):
    """Runs of two trainers, whose losses would make the worst one the best."""

    def make(**more):
        for name, trainer, loss, share in (("1", "sft", 0.9, 0.5), ("2", "dpo", 0.6, 0.4), ("3", "sft", 0.8, 0.6)):
            result = {key: share for key, is_there in more.items() if is_there}
            make_run(tmp_path / name, loss, trainer__name=trainer, lora__r=int(name), result=result)
        return tmp_path

    return make


def test_runs_of_several_trainers_are_ranked_by_what_their_answers_are_worth(stages):
    found = compared(stages(exact_match=True, composes=True))
    assert [(row.name, row.rank) for row in found.rows] == [("3", 1), ("1", 2), ("2", 3)]
    assert found.key_name == "exact_match"
    assert "exact_match" in found.columns.facts
    assert any("trainers dpo, sft do not compare, so exact_match ranks" in note for note in found.notes)


def test_runs_of_several_trainers_without_a_number_in_common_are_not_ranked(stages):
    found = compared(stages())
    assert [(row.name, row.rank, row.verdict) for row in found.rows] == [
        ("3", None, ""),
        ("1", None, ""),
        ("2", None, ""),
    ]
    assert found.verdict == [
        "Not ranked: losses and rewards of trainers dpo, sft do not compare, and no other number is in all runs. "
        "Type --where trainer=dpo, or --sort KEY."
    ]
    assert json.loads(as_json(found.rows, found.columns, found.key, found.verdict))["ranked_by"] is None
    assert as_markdown(found.rows, found.columns).count("| - |") == 3
    write_page(stages() / "page.html", found)


def test_runs_of_one_trainer_among_several_are_ranked_by_their_loss(stages):
    found = compared(stages(), where="trainer=sft")
    assert [(row.name, row.rank) for row in found.rows] == [("3", 1), ("1", 2)]
    assert found.notes == ["2 of 3 runs fit --where"]


def test_a_loss_that_is_asked_for_ranks_several_trainers_and_is_said_not_to_compare(stages):
    found = compared(stages(exact_match=True), sort="eval_loss")
    assert names(found)[0] == "2"
    assert found.notes == ["eval_loss of trainers dpo, sft does not compare: each has its own loss and reward"]


def test_runs_that_have_no_loss_are_ranked_by_their_reward(tmp_path):
    for name, worth in (("a", 0.2), ("b", 0.7)):
        result = {"objective": None, "eval_loss": None, "reward": worth}
        make_run(tmp_path / name, 1.0, trainer__name="grpo", lora__r=ord(name), result=result)
    assert [(row.name, row.rank) for row in compared(tmp_path).rows] == [("b", 1), ("a", 2)]


def test_different_objectives_are_ranked_by_the_held_out_loss_and_said(tmp_path):
    make_run(tmp_path / "a", 2.0, result={"objective": 0.1}, objective="exact_match")
    make_run(tmp_path / "b", 1.0)
    found = compared(tmp_path)
    assert names(found) == ["b", "a"]
    assert any("different objectives" in note for note in found.notes)


def test_formats_say_the_same(tmp_path):
    make_run(tmp_path / "a|b", 1.25, lora__r=8, lora__target_modules=["q_proj", "v_proj"])
    make_run(tmp_path / "<script>", 2.5, lora__r=16)
    found = compared(tmp_path)
    rows = list(csv.DictReader(io.StringIO(as_csv(found.rows, found.columns))))
    assert [(r["rank"], r["run"], r["eval_loss"], r["lora.r"]) for r in rows] == [
        ("1", "a|b", "1.25", "8"),
        ("2", "<script>", "2.5", "16"),
    ]
    told = json.loads(as_json(found.rows, found.columns, found.key, found.verdict))
    assert [row["numbers"]["eval_loss"]["mean"] for row in told["rows"]] == [1.25, 2.5]
    assert told["rows"][0]["settings"]["lora.target_modules"] == ["q_proj", "v_proj"]
    text = as_markdown(found.rows, found.columns)
    assert "a\\|b" in text
    assert "<script>" not in text


def test_a_drawn_value_is_shortened_for_a_person_and_whole_in_csv(tmp_path):
    make_run(tmp_path / "a", trainer__learning_rate=0.00038177687575118)
    make_run(tmp_path / "b", trainer__learning_rate=0.0002)
    found = compared(tmp_path)
    assert "| 0.000381777 |" in as_markdown(found.rows, found.columns)
    assert "0.00038177687575118" in as_csv(found.rows, found.columns)


def test_no_spreadsheet_computes_a_text_of_the_csv(tmp_path):
    evil = ["=1+1", "+SUM(A1)", "-2+3", "@cmd", "\t=1", "-3.5"]
    for number, text in enumerate(evil):
        make_run(tmp_path / str(number), -1.5, lora__init=text, lora__alpha=-2.0 * number)
    found = compared(tmp_path)
    rows = list(csv.DictReader(io.StringIO(as_csv(found.rows, found.columns))))
    assert sorted(row["lora.init"] for row in rows) == sorted([*(f"'{text}" for text in evil[:-1]), "-3.5"])
    assert {row["eval_loss"] for row in rows} == {"-1.5"}
    assert {float(row["lora.alpha"]) for row in rows} == {-2.0 * number for number in range(6)}


def test_columns_take_short_names_and_refuse_unknown_ones(tmp_path):
    make_run(tmp_path / "a")
    assert compared(tmp_path, columns=["run", "loss", "lr", "n"]).columns.facts == [
        "run",
        "eval_loss",
        "trainer.learning_rate",
        "n",
    ]
    with pytest.raises(ConfigError, match=r"--columns: eval_los is .* Did you mean eval_loss\?"):
        compared(tmp_path, columns=["eval_los"])
    with pytest.raises(ConfigError, match=r"--sort: lora\.rr is .* Did you mean lora\.r\?"):
        compared(tmp_path, sort="lora.rr")
    with pytest.raises(ConfigError, match=r"several settings\. Type one of: .*dataset\.max_length"):
        compared(tmp_path, columns=["max_length"])


def test_a_path_without_runs_is_one_message(tmp_path):
    make_run(tmp_path / "study" / "0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="No run lies in or below"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(RunError, match=r"no such folder. Did you mean .*study\?"):
        find_runs([tmp_path / "studdy"])
    with pytest.raises(RunError, match="is a file, not a folder"):
        find_runs([tmp_path / "study" / "0" / "run.json"])


def test_live_table_follows_a_run_until_it_has_ended(tmp_path, monkeypatch, capsys):
    from llama_lab.compare import show

    monkeypatch.setattr(show, "LIVE_EVERY_S", 0.05)
    monkeypatch.setattr(show, "QUIET_S", 0.3)
    folder = make_run(tmp_path / "run", None)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        statuses = []

        def end_soon(seconds):  # what happens while the table waits
            statuses.append(find_runs([folder])[0][0].status)
            if len(statuses) == 3:
                make_run(folder, 1.5)
                fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(seconds)

        monkeypatch.setattr(show, "time", SimpleNamespace(sleep=end_soon, monotonic=time.monotonic))
        assert show.compare(Options(paths=[tmp_path], live=True)) == 0
    assert statuses[:3] == ["running"] * 3
    assert set(statuses[3:]) == {"ok"}
    assert "1.5" in capsys.readouterr().out


def test_nothing_of_a_text_steers_the_terminal():
    assert one_line("a\x1b[2J\r\nb\x07") == "a [2J b"


def test_a_thousand_runs_are_read_without_torch(tmp_path):
    for number in range(1000):
        make_run(tmp_path / "study" / str(number), 1 + number / 1000, lora__r=number % 7 + 1, seed=number // 7)
    code = (
        "import sys; from llama_lab.compare.show import Options, comparison; from pathlib import Path\n"
        f"found = comparison(Options(paths=[Path({str(tmp_path)!r})]))\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]\n"
        "print(len(found.runs), len(found.rows), heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1000 7 []\n", done.stderr
