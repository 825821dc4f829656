"""A killed run goes on as if nothing had happened: the adapter is equal to the bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_lab.checkpoints import checkpoints_in
from llama_lab.rundir import RunDir

from .conftest import TINY, read_json, steps_logged

WORDS = [*TINY, "tracking=none", "trainer.logging_steps=1", "dataset.max_train_rows=160", "lora.dropout=0.1"]
NUM_STEPS = 20


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory) -> Path:
    return lab.run(tmp_path_factory.mktemp("undisturbed") / "run", *WORDS)


def assert_same_adapter(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


def complete(checkpoint: Path) -> bool:
    files = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    return files <= {path.name for path in checkpoint.iterdir()}


@pytest.mark.slow
def test_killed_at_random_moments_ends_bitwise_equal(lab, undisturbed, tmp_path):
    rng = random.Random(os.environ.get("LLAMA_LAB_TEST_SEED", "kill"))
    folder, kills = tmp_path / "run", sorted(rng.sample(range(1, NUM_STEPS), 3))
    words = WORDS
    for step in kills:
        is_first = step == kills[0]  # this one, and the last start, are the command as a user types it
        lab.killed(
            folder, *words, when=lambda step=step: max(steps_logged(folder), default=0) >= step, warm=not is_first
        )
        assert all(complete(path) for path in (folder / "checkpoints").glob("checkpoint-*"))
        words = [*WORDS, "trainer.resume=auto"]
    done = lab.fresh(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)
    assert steps_logged(folder) == steps_logged(undisturbed)
    result, wanted = read_json(folder / "result.json"), read_json(undisturbed / "result.json")
    for key in ("eval_loss", "eval_loss_before", "num_steps", "perplexity", "train_loss"):
        assert result[key] == wanted[key]


def test_killed_while_a_checkpoint_is_written_leaves_no_half_one(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    partial = folder / "checkpoints" / ".partial"
    lab.killed(folder, *WORDS, "trainer.save_steps=1", when=lambda: any(partial.glob("checkpoint-*/*")), warm=True)
    assert all(complete(path) for path in (folder / "checkpoints").glob("checkpoint-*"))
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)


def test_killed_before_the_first_checkpoint_starts_over(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    lab.killed(folder, *WORDS, when=lambda: (folder / "run.json").exists(), warm=True)
    done = lab(*WORDS, f"hydra.run.dir={folder}", "trainer.resume=auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)


def test_finished_run_is_not_trained_again(lab, undisturbed):
    before = (undisturbed / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    done = lab(f"resume={undisturbed}", cwd=undisturbed.parent)
    assert done.returncode == 0, done.stderr
    assert "has ended already" in done.stdout
    assert (undisturbed / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_resumed_run_keeps_its_settings(lab, undisturbed):
    done = lab(f"resume={undisturbed}", "lora.r=8", cwd=undisturbed.parent)
    assert done.returncode == 2
    assert "lora.r: 16 then, 8 now" in done.stderr


def test_resumed_run_keeps_its_rows_and_takes_odd_lines_of_its_metrics_for_none(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "result.json").unlink()
    lock = read_json(folder / "run.json")
    lock["dataset"]["fingerprint"] = "0123456789abcdef"  # as if the data had been others then
    (folder / "run.json").write_text(json.dumps(lock))
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"The rows are not those that {folder} began with: their fingerprint was 0123456789abcdef" in done.stderr
    assert read_json(folder / "run.json") == lock
    shutil.copy(undisturbed / "run.json", folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1}\n5\n[]\n{"step": null}\n{"step": "x"}\n')
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)


DAMAGES = {
    "adapter_model.safetensors": lambda content: content[:-100],
    "trainer_state.json": lambda content: content[: len(content) // 2],
    "optimizer.pt": lambda content: b"",
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "result.json").unlink()
    checkpoints = folder / "checkpoints"
    before, newest = checkpoints_in(checkpoints)
    shutil.copytree(newest, checkpoints / f"{newest.name}-of-mine")
    for name, damaged in DAMAGES.items():
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(damaged(whole))
        done = lab(f"resume={folder}", cwd=tmp_path)
        assert done.returncode == 2
        (message,) = [line for line in done.stderr.splitlines() if line.startswith("llama_lab: ")]
        assert f"{newest / name} cannot be read" in message
        assert f"Remove the folder {newest}, and the run goes on from {before}." in message
        (newest / name).write_bytes(whole)
    shutil.rmtree(newest)
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)


def test_the_second_of_two_runs_in_a_folder_writes_nothing(lab, tmp_path):
    folder = tmp_path / "run"
    with RunDir(folder).held():
        done = lab(*WORDS, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{folder} is in use by process {os.getpid()}" in done.stderr
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_run_that_is_told_to_end_is_recorded_and_goes_on(lab, undisturbed, tmp_path):
    folder = tmp_path / "run"
    lab.killed(folder, *WORDS, when=lambda: max(steps_logged(folder), default=0) >= 3, by=signal.SIGTERM, warm=True)
    assert read_json(folder / "result.json")["status"] == "failed"
    done = lab(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(undisturbed, folder)
    assert read_json(folder / "result.json")["status"] == "ok"


def test_ctrl_c_says_how_the_run_goes_on(lab, tmp_path):
    folder = tmp_path / "run"
    process = lab.start(f"hydra.run.dir={folder}", *WORDS, cwd=tmp_path)
    while process.poll() is None and not steps_logged(folder):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 of both
    assert said.strip() == f"llama_lab: interrupted. Go on with: python -m llama_lab resume={folder}"
    assert read_json(folder / "result.json")["status"] == "failed"
