"""Where merge and export write: refused before anything is loaded, one process at a time, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from .test_take_commands import MERGED_FILES, content, ended_well


@pytest.fixture
def started(lab, tiny_run, tmp_path) -> Callable[[], subprocess.Popen[str]]:
    """Begins to merge into m, and comes back once the process works there on layers of its own."""
    begun = []
    (tmp_path / "tmp").mkdir()

    def start() -> subprocess.Popen[str]:
        begun.append(lab.start("merge", tiny_run, "--to", "m", cwd=tmp_path, TMPDIR=str(tmp_path / "tmp")))
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".m.partial/layers-*")) and time.monotonic() < deadline:
            assert begun[-1].poll() is None, begun[-1].communicate()
            time.sleep(0.002)
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_a_second_merge_into_the_same_folder_is_refused(lab, tiny_run, tmp_path, started):
    first = started()
    os.killpg(first.pid, signal.SIGSTOP)
    second = lab("merge", tiny_run, "--to", "m", cwd=tmp_path)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert f"--to m: {tmp_path}/.m.partial is in use by process {first.pid}." in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    assert set(MERGED_FILES) <= set(os.listdir(tmp_path / "m"))
    assert sorted(os.listdir(tmp_path)) == ["m", "tmp"]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_merge_that_is_told_to_end_leaves_nothing(tmp_path, started, by):
    merge = started()
    os.killpg(merge.pid, by)
    _, errors = merge.communicate(timeout=60)
    # the latter where Python itself was interrupted, of which a shell shows the former
    assert merge.returncode in (128 + by, -by)
    assert "Traceback" not in errors
    assert ("llama_lab: interrupted." in errors) is (by is signal.SIGINT)
    assert [name for name in content(tmp_path) if "llama_lab" in name] == []
    assert os.listdir(tmp_path) == ["tmp"]


def test_what_a_killed_merge_left_is_removed_by_the_next_one(lab, tiny_run, tmp_path, started):
    merge = started()
    os.killpg(merge.pid, signal.SIGKILL)
    merge.wait()
    (tmp_path / ".m.partial" / "new" / "model-00009-of-00009.safetensors").touch()
    assert [name for name in content(tmp_path / "tmp") if "llama_lab" in name] == []  # all lies in that folder
    ended_well(lab("merge", tiny_run, "--to", "m", cwd=tmp_path))
    assert set(MERGED_FILES) <= set(os.listdir(tmp_path / "m"))
    assert "model-00009-of-00009.safetensors" not in os.listdir(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m", "tmp"]


def test_a_link_and_home_are_followed(lab, tiny_run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "home").mkdir()
    ended_well(lab("merge", tiny_run, "--to", "link", cwd=tmp_path))
    assert (tmp_path / "link").is_symlink()
    assert set(MERGED_FILES) <= set(os.listdir(tmp_path / "real"))
    ended_well(lab("merge", tiny_run, "--to", "~/mine", cwd=tmp_path, HOME=str(tmp_path / "home")))
    assert set(MERGED_FILES) <= set(os.listdir(tmp_path / "home" / "mine"))
    assert sorted(os.listdir(tmp_path)) == ["home", "link", "real"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge RUN --to .", "--to . is the folder you are in"),
        (f"merge RUN --to {'n' * 250}", "the name is too long"),
        (f"merge RUN --to {'n' * 260}/mine", "File name too long"),
        ("merge RUN --to dangling", "--to dangling is there already"),
        ("merge RUN --to ~/full", "--to ~/full is there already"),
        ("export RUN --gguf mine", "Type --gguf mine.gguf"),
        (f"export RUN --gguf {'n' * 250}.gguf", "the name is too long"),
        ("export RUN --gguf mine.gguf", "its Modelfile mine.Modelfile is there already"),
    ],
)
def test_places_are_refused_before_anything_is_loaded(lab, tmp_path, words, said):
    if "dangling" in words:
        (tmp_path / "dangling").symlink_to("nowhere")
    if "mine.gguf" in words:
        (tmp_path / "mine.Modelfile").touch()
    if "~/full" in words:
        (tmp_path / "full" / "of").mkdir(parents=True)
    before = os.listdir(tmp_path)
    done = lab(
        *words.replace("RUN", "nowhere").split(), cwd=tmp_path, HOME=str(tmp_path)
    )  # a run that is not there is looked for later
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == before
