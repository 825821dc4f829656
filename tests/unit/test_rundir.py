"""The files of a run are whole or absent, whatever ends the process, and one process at a time works on them."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_lab.choices import Resume
from llama_lab.errors import RunError
from llama_lab.results import Result
from llama_lab.rundir import RunDir, check_run_folder


def result(**changed: Any) -> Result:
    numbers = {
        "objective": 1.0,
        "eval_loss_before": 3.0,
        "eval_loss": 1.0,
        "perplexity": math.e,
        "train_loss": 1.5,
        "train_runtime_s": 10.0,
        "tokens_per_s": 100.0,
        "peak_memory_gib": 0.5,
        "num_trainable_params": 10,
        "num_params": 100,
        "num_steps": 5,
        "metrics_before": {"exact_match": 0.0},
        "metrics": {"exact_match": 0.5},
    }
    return Result(**numbers | changed)


def start(code: str, folder: Path) -> subprocess.Popen:
    """A process of its own that runs `code` with `run_dir` at hand, and has printed `ready`."""
    head = (
        "import time; from pathlib import Path; from llama_lab.rundir import RunDir; "
        f"run_dir = RunDir(Path({str(folder)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def forever(line: str) -> str:
    return f"for n in range(10**6):\n    {line}\n    if n == 0: print('ready', flush=True)"


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


# Whole or absent


@pytest.mark.parametrize("name", ["run.json", "result.json", "samples.md"])
def test_process_that_is_killed_while_it_writes_leaves_the_file_whole(run_dir, name):
    content = {
        "run.json": "run_dir.write_lock({'n': n, 'fill': ['x' * 1000] * 2000})",
        "result.json": "run_dir.write_result(None, status='failed', error='x' * 2_000_000)",
        "samples.md": "run_dir.write_samples('x' * 2_000_000 + '\\nend')",
    }
    file = run_dir.path / name
    for delay_s in (0.0, 0.013, 0.029):
        writer = start(forever(content[name]), run_dir.path)
        time.sleep(delay_s)
        writer.kill()
        writer.wait()
        text = file.read_text()
        assert text.endswith("end") if name == "samples.md" else json.loads(text)


def test_reader_never_sees_half_a_file(run_dir):
    writer = start(forever("run_dir.write_lock({'fill': ['x' * 1000] * 2000})"), run_dir.path)
    sizes, files, end = set(), set(), time.monotonic() + 30
    while len(files) < 20 and time.monotonic() < end:
        found = run_dir.lock.stat()
        sizes.add(found.st_size)
        files.add(found.st_mtime_ns)
    writer.kill()
    writer.wait()
    assert len(files) == 20  # it was written again and again meanwhile
    assert len(sizes) == 1


def test_text_that_cannot_be_written_leaves_the_old_file(run_dir):
    run_dir.write_samples("old")
    with pytest.raises(UnicodeEncodeError):
        run_dir.write_samples("new" * 100_000 + "\ud800")
    assert run_dir.samples.read_text() == "old"


@pytest.mark.parametrize(
    ("read", "file", "absent"),
    [("read_lock", "lock", "holds no run"), ("read_result", "result", "has no result yet")],
)
def test_file_that_is_absent_or_not_whole_is_told_apart(run_dir, read, file, absent):
    with pytest.raises(RunError, match=absent):
        getattr(run_dir, read)()
    getattr(run_dir, file).write_text('{"schema": 1, "sta')
    with pytest.raises(RunError, match="is not whole"):
        getattr(run_dir, read)()


def test_what_is_written_is_read_back(run_dir):
    lock = {"config": {"seed": 3}, "overrides": ["seed=3"], "text": "é"}
    run_dir.write_lock(lock)
    assert run_dir.read_lock() == lock
    run_dir.write_result(None, status="failed", error="DataError: é")
    assert run_dir.read_result() == {"schema": 1, "status": "failed", "error": "DataError: é"}


def test_result_holds_the_public_numbers(run_dir):
    run_dir.write_result(result(), status="ok")
    assert run_dir.read_result() == {
        "schema": 1,
        "status": "ok",
        "objective": 1.0,
        "eval_loss_before": 3.0,
        "eval_loss": 1.0,
        "perplexity": math.e,
        "train_loss": 1.5,
        "train_runtime_s": 10.0,
        "tokens_per_s": 100.0,
        "peak_memory_gib": 0.5,
        "num_trainable_params": 10,
        "num_params": 100,
        "num_steps": 5,
        "exact_match": 0.5,
        "exact_match_before": 0.0,
        "error": None,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_becomes_null(run_dir, value):
    run_dir.write_result(result(train_loss=value, metrics={"exact_match": value}), status="ok")
    run_dir.write_lock({"deep": [{"value": value}, (1.0, value)]})
    run_dir.log(1, {"train/loss": value, "train/grad_norm": 2.0})
    read = json.loads(run_dir.result.read_text(), parse_constant=no_constant)
    assert (read["train_loss"], read["exact_match"], read["eval_loss"]) == (None, None, 1.0)
    assert json.loads(run_dir.lock.read_text(), parse_constant=no_constant) == {"deep": [{"value": None}, [1.0, None]]}
    line = json.loads(run_dir.metrics.read_text(), parse_constant=no_constant)
    assert line == {"step": 1, "train/loss": None, "train/grad_norm": 2.0}


# metrics.jsonl


def test_metrics_are_read_in_the_order_in_which_they_were_logged(run_dir):
    assert run_dir.read_metrics() == []
    for step in (0, 5, 10):
        run_dir.log(step, {"train/loss": 1.0 / (step + 1)})
    assert run_dir.read_metrics() == [{"step": step, "train/loss": 1.0 / (step + 1)} for step in (0, 5, 10)]


@pytest.mark.parametrize("torn", ['{"step": 10, "train/l', '{"step": 10, "train/loss": 0.1', "{"])
def test_line_that_a_kill_cut_off_is_left_out(run_dir, torn):
    run_dir.log(5, {"train/loss": 0.5})
    with run_dir.metrics.open("a") as file:
        file.write(torn)
    assert run_dir.read_metrics() == [{"step": 5, "train/loss": 0.5}]


def test_bytes_that_are_no_text_spoil_their_line_alone(run_dir):
    run_dir.log(5, {"train/loss": 0.5})
    with run_dir.metrics.open("ab") as file:
        file.write(b"\xff\xfe\n")
    run_dir.log(10, {"train/loss": 0.25})
    assert [row["step"] for row in run_dir.read_metrics()] == [5, 10]


def test_resumed_run_writes_on_behind_a_line_that_was_cut_off(run_dir):
    run_dir.log(5, {"train/loss": 0.5})
    with run_dir.metrics.open("a") as file:
        file.write('{"step": 10, "tr')
    run_dir.rewind_metrics(5)
    run_dir.log(10, {"train/loss": 0.1})
    assert [row["step"] for row in run_dir.read_metrics()] == [5, 10]
    assert run_dir.metrics.read_text().count("\n") == 2


def test_rewinding_drops_the_later_steps_and_keeps_the_rest(run_dir):
    for step in (0, 5, 10, 15):
        run_dir.log(step, {"train/loss": float(step)})
    run_dir.rewind_metrics(10)
    assert run_dir.read_metrics() == [{"step": step, "train/loss": float(step)} for step in (0, 5, 10)]


def test_rewinding_a_run_that_has_logged_nothing_is_nothing(run_dir):
    run_dir.rewind_metrics(0)
    assert run_dir.read_metrics() == []


# One process at a time


def test_second_process_is_refused_and_told_who_holds_the_folder(run_dir):
    holder = start("with run_dir.held():\n    print('ready', flush=True); time.sleep(60)", run_dir.path)
    try:
        with pytest.raises(RunError, match=rf"{run_dir.path} is in use by process {holder.pid}\."), run_dir.held():
            pass
    finally:
        holder.kill()
        holder.wait()


def test_folder_of_a_killed_process_is_free_again(run_dir):
    holder = start("with run_dir.held():\n    print('ready', flush=True); time.sleep(60)", run_dir.path)
    holder.kill()
    holder.wait()
    with run_dir.held():
        assert (run_dir.path / ".lock").read_text() == str(os.getpid())


def test_folder_is_free_again_after_the_block_even_when_it_raises(run_dir):
    with pytest.raises(ZeroDivisionError), run_dir.held():
        raise ZeroDivisionError
    with run_dir.held():
        pass


def test_holding_makes_the_folder(tmp_path):
    with RunDir(tmp_path / "new" / "run").held():
        assert (tmp_path / "new" / "run").is_dir()


# A folder in the place of another


def fill(folder: Path, name: str) -> None:
    (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_takes_the_place_of_the_old_whole(run_dir):
    for name in ("old", "new"):
        with run_dir.replacing(run_dir.adapter) as partial:
            fill(partial, name)
    assert names(run_dir.adapter) == ["new"]
    assert names(run_dir.path) == ["adapter"]


def test_old_folder_stays_when_the_block_raises(run_dir):
    with run_dir.replacing(run_dir.adapter) as partial:
        fill(partial, "old")
    with pytest.raises(FileNotFoundError), run_dir.replacing(run_dir.adapter) as partial:
        fill(partial / "no such folder", "new")
    assert names(run_dir.adapter) == ["old"]


def test_no_folder_has_the_name_until_it_is_filled(run_dir):
    with run_dir.replacing(run_dir.adapter) as partial:
        fill(partial, "new")
        assert not run_dir.adapter.exists()
    assert names(run_dir.adapter) == ["new"]


def test_what_a_killed_process_left_is_not_taken_over(run_dir):
    writer = start(
        "with run_dir.replacing(run_dir.adapter) as partial:\n"
        "    (partial / 'left').write_text('x'); print('ready', flush=True); time.sleep(60)",
        run_dir.path,
    )
    writer.kill()
    writer.wait()
    assert not run_dir.adapter.exists()
    with run_dir.replacing(run_dir.adapter) as partial:
        fill(partial, "new")
    assert names(run_dir.adapter) == ["new"]


# Whether a folder can take a run


def test_folder_that_holds_a_run_is_refused_unless_it_goes_on(run_dir):
    run_dir.write_lock({})
    with pytest.raises(RunError, match=rf"{run_dir.path} holds a run already. Type resume={run_dir.path}"):
        check_run_folder(run_dir.path, Resume.never)
    check_run_folder(run_dir.path, Resume.auto)


def test_folder_that_is_new_or_empty_is_taken(tmp_path):
    check_run_folder(tmp_path, Resume.never)
    check_run_folder(tmp_path / "a" / "b", Resume.never)


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file, not a folder"):
        check_run_folder(tmp_path / "file" / "run", Resume.never)
