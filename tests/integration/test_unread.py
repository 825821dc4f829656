"""Nobody reads on: `python -m llama_lab ... | head -1`."""

import os
import subprocess
import sys
import time

import pytest

from .conftest import TINY, read_json


def first_line_of(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline()
    process.stdout.close()
    return line


def test_a_run_whose_output_nobody_reads_goes_on(lab, tmp_path):
    folder = tmp_path / "run"
    words = [*TINY, "tracking=none", "trainer.max_steps=2", "dataset.metrics=[]", f"hydra.run.dir={folder}"]
    process = lab.start(*words, cwd=tmp_path)
    assert first_line_of(process).startswith("tiny: ")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    assert read_json(folder / "result.json")["status"] == "ok"


@pytest.mark.parametrize(
    "words",
    [("data", "model=tiny", "dataset.max_train_rows=256", "--rows", "256", "--ids"), ("data", "--help")],
    ids=["rows", "help"],
)
def test_a_verb_whose_output_nobody_reads_ends_without_a_word(lab, tmp_path, words):
    process = lab.start(*words, cwd=tmp_path)
    process.stdout.close()
    assert process.wait(timeout=120) == 141  # 128 + SIGPIPE, as a shell shows it of other tools
    assert process.stderr.read() == ""


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_pipe_that_is_full_and_does_not_wait_loses_nothing(flags):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from llama_lab.unread import flush, watch_output; watch_output(); print('x' * 300_000); flush()"
    with subprocess.Popen([sys.executable, *flags, "-c", code], stdout=writer) as process:
        os.close(writer)
        time.sleep(0.5)  # until it is full
        with os.fdopen(reader) as file:
            assert len(file.read()) == 300_001
    assert process.returncode == 0
