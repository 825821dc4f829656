"""The message and the exit code that an error ends with."""

import logging
import os

import pytest

from llama_lab.error_report import FULL_ERROR, hydra_raises, log_failure, report_error
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
