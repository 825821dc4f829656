"""The process that trials are forked from."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
SLOW_TORCH = "import pathlib, time\npathlib.Path(__file__).with_name('begun').touch()\ntime.sleep(300)\n"
STUDY = "import time\nfrom llama_lab.sweep.processes import warm_up\nwarm_up()\ntime.sleep(300)\n"


def test_it_ends_with_a_study_that_is_killed_while_it_imports(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)  # a library whose import takes longer than anybody waits
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "CUDA_VISIBLE_DEVICES": ""}
    study = subprocess.Popen([sys.executable, "-c", STUDY], env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(study.pid).children(recursive=True)
    study.kill()
    study.wait()
    _, left = psutil.wait_procs(started, timeout=30)
    for process in left:
        process.kill()
    assert started
    assert left == []
