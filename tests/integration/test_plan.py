"""The verbs `plan` and `data` by the real command line: what they say, what they write, and their exit codes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import TINY, Lab, read_json

GOOD = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "rows.jsonl", GOOD)


def test_plan_says_what_the_run_then_does(lab: Lab, tmp_path: Path, tiny_run: Path):
    done = lab("plan", *TINY, "lora.r=4", "--tokens-per-s", "1000", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result, lock = read_json(tiny_run / "result.json"), read_json(tiny_run / "run.json")
    said = " ".join(done.stdout.split())
    assert f"optimizer steps │ {result['num_steps']} (1 passes)" in said
    assert f"trained │ {result['num_trainable_params']:,} (" in said
    assert f"parameters │ {result['num_params']:,} │" in said
    assert f"{lock['dataset']['num_train_rows']}, {lock['dataset']['num_valid_rows']}" in said
    assert "1,000/s, as given" in said
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_time_is_that_of_a_finished_run_of_the_same_kind_on_the_machine_it_names(
    lab: Lab, tmp_path: Path, tiny_run: Path
):
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    lock = read_json(tiny_run / "run.json")
    lock["hardware"]["gpus"] = ["Some GPU", "Some GPU"]
    (run / "run.json").write_text(json.dumps(lock))
    (run / "result.json").write_text(json.dumps(read_json(tiny_run / "result.json") | {"tokens_per_s": 500.0}))
    said = " ".join(lab("plan", *TINY, "lora.r=4", cwd=tmp_path).stdout.split())
    assert "at 500/s, measured in outputs/run on Some GPU." in said
    assert "Time: unknown" in lab("plan", *TINY, "quant=none", cwd=tmp_path).stdout


def test_rows_are_shown_as_they_are_learned(lab: Lab, tmp_path: Path, rows_file: Path):
    words = ["model=tiny", "dataset=jsonl", f"dataset.path={rows_file}", "--rows", "2"]
    done = lab("data", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if "[INST]" in line]
    assert len(shown) == 2
    assert all(line.count("⟦") == 1 and "</s>⟧" in line and line.count("<s>") == 1 for line in shown)
    with_ids = lab("data", *words, "--ids", cwd=tmp_path).stdout
    assert "<s>|1" in with_ids
    assert "</s>|2" in with_ids


def test_page_needs_no_network_and_escapes_what_rows_say(lab: Lab, tmp_path: Path):
    evil = [*GOOD, {"prompt": "<script>alert(1)</script>", "completion": "</span><b>x"}]
    file, page = jsonl(tmp_path / "rows.jsonl", evil), tmp_path / "rows.html"
    done = lab("data", "model=tiny", "dataset=jsonl", f"dataset.path={file}", "--html", str(page), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text
    assert text.count("<h3>") == 39
    assert 'class="learned"' in text
    assert 'class="padding"' in text


def test_warnings_have_exit_code_1(lab: Lab, tmp_path: Path):
    file = jsonl(tmp_path / "rows.jsonl", [*GOOD, *GOOD[:4]])
    words = ["model=tiny", "dataset=jsonl", f"dataset.path={file}", "dataset.max_leak_share=1", "seed=3"]
    done = lab("plan", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "training rows come again" in done.stdout


def test_what_fails_in_plan_fails_in_the_run(lab: Lab, tmp_path: Path):
    file = jsonl(tmp_path / "rows.jsonl", [{"prompt": "same", "completion": f"{i}"} for i in range(40)])
    words = ["model=tiny", "dataset=jsonl", f"dataset.path={file}"]
    done = lab("plan", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "ask what a training row asks, more than dataset.max_leak_share=0.1 allows" in " ".join(done.stdout.split())
    run = lab(*words, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("llama_lab: The data cannot be trained on: 2 of 2 held-out rows ask")
    assert read_json(tmp_path / "run" / "result.json")["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "lora.rr=8"], "lora.r"),
        (["plan", "modell=tiny"], "model"),
        (["plan", "model=tiny", "gpu"], "KEY=VALUE"),
        (["plan", "model=tiny", "--rowz", "3"], "--rows"),
        (["plan", "model=tiny", "--rows", "x"], "whole number"),
        (["plan", "model=tiny", "--tokens-per-s", "0"], "positive"),
        (["plan", "model=tiny", "lora.r=0"], "lora.r=0"),
        (["data", "model=tiny", "dataset=jsonl"], "dataset.path"),
        (["data", "model=tiny", "--html", "/dev/null/x.html"], "--html"),
        (["pln", "model=tiny"], "plan"),
    ],
)
def test_wrong_words_are_told_in_one_message(lab: Lab, tmp_path: Path, words, expected):
    done = lab(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_reached_still_gets_its_memory(lab: Lab, tmp_path: Path):
    done = lab("plan", "model=llama2_7b", "lora.r=64", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "159,907,840" in done.stdout  # rank 64 on all linear layers of the 7B
    assert "RTX 3090" in done.stdout
    assert "not in the local hub cache" in " ".join(done.stdout.split())


def test_plan_says_that_a_base_cannot_be_loaded_of_which_it_can_read_the_tokenizer(
    lab: Lab, tmp_path: Path, tiny_run: Path, shared: Path
):
    (tiny,) = (shared / "llama_lab_cache").glob("tiny-*")
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "config.json").write_text("{}")
    done = lab("plan", *TINY, f"model.name={base}", "model.source=hub", "model.package=null", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"FAILS base model.name={base} cannot be loaded" in " ".join(done.stdout.split())
    assert done.stderr == ""
