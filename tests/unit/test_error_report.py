"""The message and the exit code that an error ends with."""

import errno
import logging
import os

import pytest

from llama_lab.error_report import FULL_ERROR, hydra_raises, is_disk_full, log_failure, report_error
from llama_lab.errors import ConfigError


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch):
    monkeypatch.delenv(FULL_ERROR, raising=False)


def test_an_error_of_the_user_is_its_message(capsys):
    assert report_error(raised(ConfigError("lora.r=0: type lora.r=8"))) == 2
    assert capsys.readouterr().err == "llama_lab: lora.r=0: type lora.r=8\n"


def test_a_fault_says_where_its_traceback_is(capsys, caplog):
    fault = raised(ZeroDivisionError("of ours"))
    assert report_error(fault) == 1
    assert capsys.readouterr().err == f"llama_lab: ZeroDivisionError: of ours\n{FULL_ERROR}=1 shows the traceback.\n"
    with caplog.at_level(logging.ERROR):
        log_failure(fault)
    assert "in raised" in caplog.text
    assert report_error(fault) == 1
    assert "llama_lab.log in the run's folder has the traceback" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_message(capsys, tmp_path):
    with pytest.raises(OSError, match="nowhere") as caught:
        (tmp_path / "nowhere" / "file").read_text()
    assert report_error(caught.value) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llama_lab: {tmp_path / 'nowhere' / 'file'}: No such file or directory.")
    assert report_error(raised(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 1


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTEMPTY, errno.EBUSY])
def test_what_the_system_refuses_of_a_name_is_one_message(capsys, number):
    assert report_error(raised(OSError(number, os.strerror(number), "my_model"))) == 2
    assert capsys.readouterr().err.startswith(f"llama_lab: my_model: {os.strerror(number)}. Look whether")
    assert report_error(raised(OSError(number, os.strerror(number)))) == 1  # of no name: a fault


def test_a_full_disk_is_known_by_what_each_library_says_of_it(capsys):
    full = raised(OSError(errno.ENOSPC, "No space left on device", "outputs/run"))
    assert report_error(full) == 2
    assert "outputs/run: the disk is full. Free some space" in capsys.readouterr().err
    behind = raised(ValueError("wrapped"))
    behind.__cause__ = full
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 96960 vs 96848")
    tensors = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    assert all(map(is_disk_full, (full, behind, torchs, tensors)))
    assert not is_disk_full(RuntimeError("CUDA out of memory"))


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    error = ValueError("round")
    error.__cause__ = error
    assert not is_disk_full(error)


@pytest.mark.parametrize(("asked", "is_shown"), [("1", True), ("0", False), (None, False)])
def test_a_traceback_is_for_who_asks_whatever_hydra_is_told(capsys, monkeypatch, asked, is_shown):
    if asked:
        monkeypatch.setenv(FULL_ERROR, asked)
    before = dict(os.environ)
    with hydra_raises():
        assert os.environ[FULL_ERROR] == "1"
        with hydra_raises():  # a process that a sweep has started
            report_error(raised(ConfigError("wrong")))
        assert ("in raised" in capsys.readouterr().err) is is_shown
    assert dict(os.environ) == before
    report_error(raised(ConfigError("wrong")))
    assert ("in raised" in capsys.readouterr().err) is is_shown
