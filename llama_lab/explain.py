"""What Hydra and OmegaConf say of a wrong word, told as one message with the nearest right one."""

import re
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from llama_lab.errors import ConfigError, LlamaLabError, RunError, did_you_mean
from llama_lab.known_keys import default_of, field_type, known_keys, nearest_key, unknown_key

HYDRA_SAYS = {
    r"Additional config directory '(.+)' not found": "--config-dir: there is no folder {}.",
    r"Primary config (?:module|directory).* not found": (
        "--config-path: there is no such folder of configurations. Leave it out, and name folders of your own with "
        "--config-dir FOLDER."
    ),
    r"In '(\w+)/(\w+)': Could not override": (
        "{0}/{1} is a choice of the group {0}, no configuration of its own. Type {0}={1} instead of --config-name."
    ),
    r"Sweep parameters '(.+)' requires": "{0} stands for several values. Type them one by one: -m KEY=A,B",
    r"Sweeping over Hydra's configuration is not supported : '([^=]+)=(.*)'": (
        "{0}={1}: the settings of the sweep itself have one value each. Type {0}=VALUE."
    ),
    r"Config group override must be a string": "A group takes the name of a choice. Type GROUP=CHOICE; see --help.",
    r"Multiple values for (\S+?)\. To override": "{0} has a choice already. Type {0}=CHOICE, without a + before it.",
    r"Only one of --run, --multirun, --cfg": (
        "--cfg shows one run, and -m is many. Leave -m out; --cfg hydra shows the settings of the study as well."
    ),
    r"Could not override 'hydra/sweeper/(\w+)'. No match": (
        "hydra/sweeper/{0} belongs to a study. Type search=lora_quant, or hydra/sweeper=optuna, as well."
    ),
    r"Cannot merge DictConfig with ListConfig": (
        "That is a group of settings, and no list. Each is typed by name: GROUP.KEY=VALUE; see --cfg job."
    ),
    r"Could not append to config. An item is already at '(\S+)'": "{0} is there already. Leave the + out: {0}=...",
}
"""What Hydra says in words of its insides, as a pattern, and what a person can do with."""


LAUNCHER_PACKAGES = {
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers that come from pip packages."""


def missing_launcher(choice: str) -> ConfigError:
    """The message for hydra/launcher=CHOICE without its package."""
    package = LAUNCHER_PACKAGES[choice]
    return ConfigError(
        f"hydra/launcher={choice} comes from the pip package {package}, which is not installed. "
        f"Type: python -m pip install {package}"
    )


def explain(error: Exception, word: str = "") -> LlamaLabError:
    """Turn an error of Hydra's or OmegaConf's into ours: what was wrong, where, and what to type instead.

    Args:
        word: the word of the command line that caused it, where the error does not say so itself.
    """
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    key = str(getattr(cause, "full_key", None) or "")
    word = word or str(error).partition("Error merging override ")[2].strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        return _unreadable_word(error.override or "")
    if isinstance(error, OSError) and error.filename:
        return RunError(f"{error.filename} cannot be written: {error.strerror}. Type another hydra.run.dir.")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and key:
        named = re.match(r"Could not override '([^']+)'", str(error))
        group = named[1] if named else ""
        is_inside = group in known_keys() or not group  # of KEY={A: B} the unknown one is A
        return unknown_key(key if is_inside else group)
    if isinstance(cause, ValidationError | ConfigTypeError) and key:
        return _wrong_type(key, _first_line(cause), word)
    if isinstance(cause, InterpolationResolutionError):
        return _unresolved(key or "A value", _first_line(cause))
    if "To sweep over it, add --multirun" in str(error):
        return _several_values(_first_line(error))
    return _in_our_words(error)


def no_value(word: str) -> ConfigError:
    """The error for a word that is not KEY=VALUE, with the setting that was probably meant."""
    key, colon, value = word.lstrip("+").partition(":")
    found = key if key in known_keys() else nearest_key(key)
    if colon and found:
        return ConfigError(f"'{word}' is no setting. Settings are typed KEY=VALUE: {found}={value.strip()}")
    return ConfigError(f"'{word}' has no value. Settings are typed KEY=VALUE, such as {found or 'lora.r'}=...")


def _in_our_words(error: Exception) -> ConfigError:
    """The message itself, its lines joined; some of Hydra's speak of its insides and get our words."""
    said = " ".join(line.strip() for line in str(error).splitlines() if "http" not in line)
    for pattern, told in HYDRA_SAYS.items():
        if found := re.search(pattern, said):
            return ConfigError(told.format(*found.groups()))
    if found := re.search(r"Could not delete from config. '(\S+)' does not exist", said):
        return unknown_key(found[1])
    return ConfigError(said)


def _unknown_choice(error: MissingConfigException) -> ConfigError:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return ConfigError(f"There is no configuration named {choice}. Leave --config-name out, or add --config-dir.")
    if group == "hydra/launcher" and choice in LAUNCHER_PACKAGES:
        return missing_launcher(choice)
    if (group, choice) == ("trainer", "ppo"):
        return no_ppo()
    options = sorted(set(error.options or []) - {"schema"})
    if not options:
        return ConfigError(f"{group}={choice}: there is no group {group}.{did_you_mean(group, known_keys())}")
    hint = did_you_mean(choice, options, f"{group}={{}}")
    return ConfigError(f"{group}={choice} is no choice.{hint} Choices of {group}: {', '.join(options)}.")


def no_ppo() -> ConfigError:
    """The message for the trainer that people ask for and TRL no longer has."""
    return ConfigError(
        "trainer=ppo: TRL has no PPO any more (since 1.16). Type trainer=grpo or trainer=rloo, where rewards score the "
        "model's own answers (trainer.reward_model=FOLDER, too); trainer=dpo to learn from pairs of answers, or "
        "trainer=kto where each answer is good or bad."
    )


def _unreadable_word(word: str) -> ConfigError:
    key, _, value = word.partition("=")
    if key.startswith("stages.") and "'" not in value:
        return ConfigError(f"'{word}' cannot be read: each word of a stage stands in quotes. {_in_stage(key, value)}")
    if any(part.partition("=")[0] in known_keys() for part in word.split(" ")[1:] if "=" in part):
        return ConfigError(f"'{word}' is one word with several settings. Leave the quotes out: {word}")
    if "=" not in word and not word.startswith("~"):
        return no_value(word)
    if key.strip() in known_keys() and (key, value[:1]) != (key.strip(), value[:1].strip(" =")):
        return ConfigError(f"'{word}' is typed without spaces and with one =: {key.strip()}={value.strip(' =')}")
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")) or value.count('"') % 2:
        return ConfigError(f"'{word}' cannot be read: a bracket or a quote is not closed. {_in_quotes(key, '...')}")
    if value.startswith("choice(") and re.search(r"\bnull\b", value):
        return ConfigError(f"'{word}': Hydra's choice() takes no null. Type the values alone: {key}={value[7:-1]}")
    if key.lstrip("+") not in known_keys() and not key.lstrip("+").startswith("hydra."):
        return unknown_key(key.lstrip("+"))
    return ConfigError(f"'{word}' cannot be read as KEY=VALUE. {_in_quotes(key, value)}")


def _in_stage(key: str, value: str) -> str:
    quoted = ",".join(f"'{part}'" for part in value.strip("[]'\"").split(","))
    return f'Type "{key}=[{quoted}]"'


def _in_quotes(key: str, value: str) -> str:
    return f"A text with special characters is typed in two kinds of quotes: '{key}=\"{value}\"'"


def _several_values(line: str) -> ConfigError:
    word = line.partition("'")[2].rstrip("'")
    key, _, value = word.partition("=")
    if field_type(key) is str:
        return ConfigError(f"{word}: these are several values; -m runs each of them. {_in_quotes(key, value)}")
    return ConfigError(f"{word}: these are several values. Run each of them: python -m llama_lab -m {word}")


def _unresolved(key: str, reason: str) -> ConfigError:
    """A ${...} that leads nowhere."""
    if found := re.search(r"Environment variable '(\S+)' not found", reason):
        return ConfigError(
            f"{key}: the environment variable {found[1]} is not set. Set it, or give a value for its absence: "
            f"${{oc.env:{found[1]},VALUE}}."
        )
    if "Recursive" in reason:
        return ConfigError(f"{key} refers to itself. Type a value instead.")
    if found := re.search(r"key '(\S+)' not found", reason):
        hint = did_you_mean(found[1], known_keys(), "${{{}}}")
        return ConfigError(f"{key} refers to ${{{found[1]}}}, which is no setting.{hint}")
    return ConfigError(f"{key} refers to something that is not there: {reason}.")


def _wrong_type(key: str, message: str, word: str) -> ConfigError:
    """The error for a value of the wrong type.

    Args:
        message: what OmegaConf said.
        word: the word that gave the value; empty where it came from a file.
    """
    if word.partition("=")[0].lstrip("+").startswith(f"{key}."):
        return unknown_key(word.partition("=")[0].lstrip("+"))
    key = key.partition("[")[0]
    if key == "trainer.name" and word.endswith("=ppo"):
        return no_ppo()
    declared = field_type(key)
    wanted = _describe(declared, key)
    if is_dataclass(declared):
        example = f"{key}.{fields(declared)[0].name}"
        return ConfigError(f"{word or key}: {key} is a group of settings, each of them typed by name: {example}=VALUE")
    if "is not Optional" in message:
        takes = f" It takes {wanted}." if wanted else " Leave it out to keep its own."
        return ConfigError(f"{key}=null: this setting needs a value.{takes}")
    if key.startswith("stages.") and word:
        return ConfigError(f"{word}: a stage is a list of words. {_in_stage(key, word.partition('=')[2])}")
    if wanted is None:
        return ConfigError(f"{word or key}: {message}.")
    found = re.search(r"[Vv]alue '?(.*?)'?(?: of type| is not| could not| \(|, expected|$)", message)
    said = word or f"{key}={found[1] if found else '...'}"
    hint = ""
    if isinstance(declared, type) and issubclass(declared, StrEnum):
        hint = did_you_mean(said.partition("=")[2], list(declared), f"{key}={{}}")
    return ConfigError(f"{said}: that is not {wanted}.{hint}")


def _describe(declared: Any, key: str) -> str | None:
    if isinstance(declared, type) and issubclass(declared, StrEnum):
        return f"one of {', '.join(declared)}"
    if get_origin(declared) is list:
        kinds = {int: ("whole numbers", "[0,1]"), float: ("numbers", "[1,0.5]")}
        kind, example = kinds.get(get_args(declared)[0], ("texts", "[a,b]"))
        return f"a list of {kind}, such as {key}={example}"
    if declared not in (int, float, bool, str):
        return None
    example = default_of(key)
    such = "" if example is None else f", such as {key}={example}"
    return {int: f"a whole number{such}", float: f"a number{such}", bool: "true or false", str: "a text"}[declared]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
