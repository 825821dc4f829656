"""Studies whose trials fail, are killed, or ask for what is not there; and the GPU that each trial gets."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from .conftest import read_json
from .studies import LEAN, RANK, STUDY, folders, trials


@pytest.mark.slow
def test_trials_that_fail_are_recorded_and_the_rest_goes_on(lab, tmp_path):
    points = [
        "{trainer.learning_rate: 1e38, dataset.max_length: 256, lora: all_linear, quant: nf4}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 12, lora: all_linear, quant: nf4}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 256, lora: dora, quant: int8}",
        "{trainer.learning_rate: 1e-3, dataset.max_length: 256, lora: all_linear, quant: none}",
    ]
    words = [*LEAN, "trainer.logging_steps=1", "trainer.num_train_epochs=8", "hydra.sweeper.n_trials=4"]
    words += ["hydra.sweeper.max_failure_rate=1"]
    space = ["trainer.learning_rate=choice(1e-3,1e38)", "dataset.max_length=choice(256,12)"]
    space += ["lora=choice(dora,all_linear)", "quant=choice(none,int8,nf4)"]
    process = lab.start(*STUDY, *words, *space, f"hydra.sweeper.baselines=[{','.join(points)}]", cwd=tmp_path)
    study = tmp_path / "outputs" / "study"
    killed: list[int] = []
    threading.Thread(target=kill_twice, args=(study / "3", killed, process), daemon=True).start()
    out, err = process.communicate(timeout=120)
    rows = trials(study)
    assert [row["state"] for row in rows] == ["failed", "failed", "infeasible", "failed"], out + err
    for row, said in zip(rows, ["loss is nan", "dataset.max_length=12", "dora", "SIGKILL"], strict=True):
        assert said in row["error"]
    assert len(set(killed)) == 2
    assert rows[3]["deaths"] == "2"
    assert read_json(study / "2" / "result.json")["status"] == "infeasible"
    assert process.returncode == 2
    assert "None of the 4 trials ended well" in err
    assert "trial 0: RunError: The training loss is nan" in err


def kill_twice(folder: Path, killed: list[int], study: subprocess.Popen) -> None:
    """What the system does to a process when memory is short, to a trial and to its second start."""
    while len(killed) < 2 and study.poll() is None:
        trained = (folder / "metrics.jsonl").exists()
        pid = (folder / ".lock").read_text().strip() if (folder / ".lock").exists() else ""
        if trained and pid and int(pid) not in killed:
            killed.append(int(pid))
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


@pytest.mark.slow
def test_the_result_of_another_run_in_a_trials_folder_is_not_taken(lab, tmp_path):
    deep = "hydra.sweep.subdir=${hydra.job.num}/x"
    first = lab(*STUDY, *LEAN, deep, "hydra.sweeper.n_trials=1", "lora.r=choice(4)", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    study = tmp_path / "outputs" / "study"
    before = (study / "0" / "x" / "result.json").read_bytes()
    (study / "study.journal").unlink()
    done = lab(*STUDY, *LEAN, deep, "hydra.sweeper.n_trials=1", "lora.r=choice(8)", cwd=tmp_path)
    assert done.returncode == 2
    assert "0/x holds another run. Type hydra.sweep.dir=FOLDER" in done.stderr
    assert "lora.r: 4 then, 8 now" in done.stderr
    assert (study / "0" / "x" / "result.json").read_bytes() == before


def test_hopeless_study_stops_with_the_first_error(lab, tmp_path):
    words = [*LEAN, "hydra.sweeper.n_trials=20", "trainer.learning_rate=choice(1e37,1e38)"]
    done = lab(*STUDY, *words, "hydra.sweeper.max_failure_rate=0", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of the 1 trials of this start failed" in done.stderr
    assert "loss is nan" in done.stderr
    assert folders(tmp_path / "outputs" / "study") == [0]


SAYS_ITS_GPU = """
import functools, json, os, sys, time
from llama_lab import app
from llama_lab.rundir import RunDir
from llama_lab.sweep import child, driver

def work(order, pipe):
    child._prepare(order)
    others = [order.folder.with_name(str(n)) / "result.json" for n in (1, 2, 3)]
    while order.folder.name == "0" and not all(other.exists() for other in others):
        time.sleep(0.05)  # the test's own time limit ends it where the other slot does not do all the rest
    known = [name for name in ("torch", "bitsandbytes") if name in sys.modules]
    result = {"status": "ok", "eval_loss": 1.0, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "imported": known}
    RunDir(order.folder).result.write_text(json.dumps(result))

if __name__ == "__main__":
    driver.TrialTask = functools.partial(driver.TrialTask, work=work)
    app.launch(["-m", *sys.argv[1:]])
"""


def test_each_slot_has_a_gpu_of_its_own_and_takes_the_next_trial_at_once(environment, tmp_path):
    (tmp_path / "says_its_gpu.py").write_text(SAYS_ITS_GPU)
    words = [*STUDY[1:], "model=tiny", RANK, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    command = [sys.executable, "says_its_gpu.py", *words]
    environment |= {"CUDA_VISIBLE_DEVICES": "3,7"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    files = [tmp_path / "outputs" / "study" / str(n) / "result.json" for n in range(4)]
    results = [read_json(file) for file in files]
    assert done.returncode == 0
    assert sorted(result["gpu"] for result in results) in (["3", "3", "3", "7"], ["3", "7", "7", "7"])
    assert [result["gpu"] for result in results].count(results[0]["gpu"]) == 1
    assert all(result["imported"] == ["torch"] for result in results)  # bitsandbytes would begin CUDA before the fork
