"""Errors a user can cause. Each one says what was wrong, where, and what to type instead."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class LlamaLabError(Exception):
    """Base of every error that is shown as one message, without a traceback; the process ends with `exit_code`."""

    exit_code = 2


class ConfigError(LlamaLabError):
    """A word, a key, a choice or a value that cannot be right."""


class DataError(LlamaLabError):
    """A data set that cannot be read or cannot be trained on."""


class ModelError(LlamaLabError):
    """A base model, tokenizer or adapter that cannot be loaded."""


class RunError(LlamaLabError):
    """A folder of a run that cannot be used as asked."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice closest to `word` in spelling, or None when none is close."""
    choices = list(choices)
    by_lower_case = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.5)
    return by_lower_case[found[0]] if found else None


def did_you_mean(word: str, choices: Iterable[str], template: str = "{}") -> str:
    """' Did you mean X?' with the nearest choice written into `template`; empty where nothing is near."""
    found = nearest(word, choices)
    return f" Did you mean {template.format(found)}?" if found else ""


def no_folder(path: Path, prefix: str = "") -> str:
    """What is wrong with a path that is no folder: a file is there, or nothing, with the nearest name beside it.

    Args:
        prefix: what stands before the path where it is typed, such as `resume=`.
    """
    if os.path.lexists(path):
        return "that is a file, not a folder."
    above = path.parent
    beside = os.listdir(above) if os.path.isdir(above) and os.access(above, os.R_OK | os.X_OK) else []
    return "there is no such folder." + did_you_mean(path.name, beside, prefix + str(above / "{}"))


def check_range(ok: bool, key: str, value: object, rule: str) -> None:
    """Refuse a value that is out of its range.

    Raises:
        ConfigError: names the setting, and `rule` as what to type.
    """
    if not ok:
        raise ConfigError(f"{key}={value} is out of range: {rule}.")
