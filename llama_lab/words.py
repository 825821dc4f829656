"""The words of the command line before Hydra reads them: what it would take for something else, or refuse in its own
words, ends here."""

from __future__ import annotations

import argparse
import re
from math import isfinite
from pathlib import Path

from hydra._internal.utils import get_args_parser  # the parser that hydra.main reads the same words with
from hydra.core.override_parser.types import Override, RangeSweep

from llama_lab.cli import VERBS, WordParser
from llama_lab.errors import ConfigError
from llama_lab.known_keys import known_keys, unknown_key

GROUPS = ("model", "quant", "lora", "dataset", "trainer", "tracking", "experiment", "search")
HYDRA_GROUPS = ("hydra.sweeper", "hydra.launcher", "hydra.sweeper.sampler", "hydra.sweeper.pruner")
STUDY_KEY = re.compile(r"^([+~]*)search\.")
"""search.n_trials=8 is short for hydra.sweeper.n_trials=8."""
NO_CHOICE = re.compile(r"null|true|false|[-+]?[0-9.]+|[\[{(].*", re.IGNORECASE)
"""Values that Hydra reads as something else than the name of a choice."""


def ordered(words: list[str]) -> list[str]:
    """The words with the settings first and Hydra's flags after them; mixed, Hydra would not know some of them.

    A key of `search.` becomes one of `hydra.sweeper.`, where Hydra has the settings of a study.

    Raises:
        ConfigError: a flag that Hydra does not have, or a setting that it would misread; says what to type.
    """
    args = _flag_parser().parse_intermixed_args(words)
    settings = list(args.overrides)
    for word in settings:
        check_word(word)
    if args.cfg == "job" and args.package not in (None, "_global_", *known_keys()):
        raise unknown_key(args.package)
    flags = [word for word in words if word not in settings]
    return [STUDY_KEY.sub(r"\1hydra.sweeper.", word) for word in settings] + flags


def resumed(words: list[str]) -> tuple[Path, list[str]] | None:
    """The folder that `resume=` names, and the other settings; None where no run is to be resumed.

    Raises:
        ConfigError: more is asked for than going on with one run.
    """
    named = [value for word in words if (value := _resume_of(word)) is not None]
    flags = _flag_parser().parse_intermixed_args(words)
    if not named or flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion:
        return None
    if len(named) > 1 or flags.multirun:
        raise ConfigError("resume= goes on with one run, named once. Leave -m out, and type resume=outputs/DATE/TIME.")
    if not named[0]:
        raise ConfigError("resume= names no folder. Type resume=outputs/DATE/TIME.")
    return Path(named[0]), [word for word in flags.overrides if _resume_of(word) is None]


def check_word(word: str) -> None:
    """Refuse a setting that Hydra would take for something else, or explain in words of its own.

    Raises:
        ConfigError: names the word and what to type.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if word in VERBS:
        raise ConfigError(f"{word} is a verb and goes first. Type: python -m llama_lab {word} --help")
    if equals and not name:
        raise ConfigError(f"'{word}' names no setting. Settings are typed KEY=VALUE, such as lora.r=8.")
    if key.startswith("~") and name in known_keys():
        raise ConfigError(f"{word}: every run needs {name}, so it cannot be deleted. Type {name}=... to change it.")
    if key.startswith("+") and not key.startswith("++") and name in (*known_keys(), *GROUPS):
        raise ConfigError(f"{word}: {name} is there already. Leave the + out: {word[1:]}")
    if name in HYDRA_GROUPS and value:
        raise ConfigError(f"{word}: this is a group. Type {name.replace('.', '/')}={value}")
    if name in ("experiment", "search") and value == "null":
        raise ConfigError(f"{word}: no {name} is what runs without this word. Leave it out.")
    if name == "search" and "," in value:
        raise ConfigError(f"{word}: these are several studies. Type one of them.")
    if name in GROUPS and equals and (not value or NO_CHOICE.fullmatch(value)):
        raise ConfigError(
            f"{word}: a group takes the name of one choice. Type {name}=CHOICE, or -m {name}=A,B for several runs; "
            "--help lists the choices."
        )


def check_values(override: Override) -> None:
    """Refuse a word that stands for several values and has none.

    Raises:
        ConfigError: names the word.
    """
    value, hint = override.value(), "Type range(FIRST,END,STEP), such as lora.r=range(8,33,8)."
    if isinstance(value, RangeSweep) and not all(map(isfinite, (value.start or 0, value.stop or 0, value.step or 1))):
        raise ConfigError(f"{override.input_line}: the ends of a range are finite numbers. {hint}")
    try:
        if not any(True for _ in override.sweep_iterator()):
            raise ConfigError(f"{override.input_line}: there is no value to choose from.")
    except ValueError as error:  # Hydra computes a range when it is asked for its values
        raise ConfigError(f"{override.input_line}: {error}. {hint}") from None


def _resume_of(word: str) -> str | None:
    key, _, value = word.partition("=")
    return value if key.lstrip("+") == "resume" and value != "null" else None


def _flag_parser() -> argparse.ArgumentParser:
    return WordParser(prog="python -m llama_lab", add_help=False, parents=[get_args_parser()])
