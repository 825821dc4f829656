"""Signals that end a process, where a library drops what they raise."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from llama_lab.process import end_if_told, forget_signals, signals_raise, told_to_end
from llama_lab.take.target import new_folder


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget_signals()


def dropped(by: signal.Signals) -> None:
    """As a library in C does that takes each error for one of its own."""
    with suppress(BaseException):
        os.kill(os.getpid(), by)


@pytest.mark.parametrize(("by", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_was_dropped_is_raised_again_before_a_folder_gets_its_name(tmp_path, by, raised):
    with signals_raise(by):
        with pytest.raises(raised), new_folder(tmp_path / "new"):
            dropped(by)
        assert told_to_end() == 128 + by
        forget_signals()
        assert told_to_end() is None
        end_if_told()
    assert os.listdir(tmp_path) == []


def test_signals_do_again_what_they_did():
    before = signal.getsignal(signal.SIGINT)
    with signals_raise(signal.SIGINT):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
