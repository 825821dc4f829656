"""What Hydra and OmegaConf say of a wrong word, told as one message with the nearest right one."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, did_you_mean, nearest

ALIASES = {
    "rank": "lora.r",
    "alpha": "lora.alpha",
    "lora.rank": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lr": "trainer.learning_rate",
    "trainer.lr": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "trainer.epochs": "trainer.num_train_epochs",
    "batch_size": "trainer.per_device_train_batch_size",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "trainer.micro_batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_steps": "trainer.warmup_ratio",
    "quant.load_in_4bit": "quant.type",
    "output_dir": "hydra.run.dir",
}
"""Words of other tools, and what they are called here."""


def known_keys(node: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every group and setting of the schema by its dotted name, such as `lora` and `lora.r`."""
    for name, hint in get_type_hints(node).items():
        yield prefix + name
        if is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The setting that was probably meant: another tool's word, the same last name elsewhere, or a like spelling."""
    if key in ALIASES:
        return ALIASES[key]
    keys = [*known_keys(), "hydra.run.dir", "hydra.sweep.dir", "hydra.launcher", "hydra.sweeper", "experiment"]
    same_leaf = [k for k in keys if "." in k and k.split(".")[-1] == key.split(".")[-1] and not k.startswith("model.")]
    return same_leaf[0] if same_leaf else nearest(key, keys)


def unknown_key(key: str) -> ConfigError:
    """The error for a setting that does not exist, with the one that was probably meant."""
    found = nearest_key(key)
    hint = f" Did you mean {found}?" if found else ""
    return ConfigError(f"{key} is no setting of llama_lab.{hint} All of them: python -m llama_lab --cfg job")


def explain(error: Exception) -> ConfigError:
    """Turn an error of Hydra's or OmegaConf's into ours: what was wrong, where, and what to type instead."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        return _unreadable_word(error.override)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return unknown_key(str(cause.full_key))
    if isinstance(cause, ValidationError) and cause.full_key:
        return _wrong_type(str(cause.full_key), str(cause).splitlines()[0])
    if isinstance(cause, InterpolationResolutionError):
        return ConfigError(f"{cause.full_key} refers to something that is not there: {_first_line(cause)}.")
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return ConfigError("A group was set to null. Type GROUP=CHOICE; --help lists the choices of every group.")
    if "To sweep over it, add --multirun" in str(error):
        return ConfigError(f"{_first_line(error)}. Add -m to run each of the values: python -m llama_lab -m KEY=A,B")
    return ConfigError(" ".join(line.strip() for line in str(error).splitlines() if "http" not in line))


def _unknown_choice(error: MissingConfigException) -> ConfigError:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return ConfigError(f"There is no configuration named {choice}. Leave --config-name out, or add --config-dir.")
    options = sorted(error.options or [])
    if not options:
        return ConfigError(f"{group}={choice}: there is no group {group}.{did_you_mean(group, known_keys())}")
    hint = did_you_mean(choice, options, f"{group}={{}}")
    return ConfigError(f"{group}={choice} is no choice.{hint} Choices of {group}: {', '.join(options)}.")


def _unreadable_word(word: str | None) -> ConfigError:
    word = word or ""
    if word.count("=") > 1 and " " in word:
        return ConfigError(f"'{word}' is one word with several settings. Leave the quotes out: {word}")
    if "=" not in word and not word.startswith("~"):
        found = nearest_key(word.lstrip("+"))
        return ConfigError(f"'{word}' has no value. Settings are typed KEY=VALUE, such as {found or 'lora.r'}=...")
    return ConfigError(
        f"'{word}' cannot be read as KEY=VALUE. Put values with special characters into two kinds of quotes, "
        "such as 'tracking.name=\"a, b\"'."
    )


def _wrong_type(key: str, message: str) -> ConfigError:
    wanted = _describe(_field_type(key), key)
    if "is not Optional" in message:
        return ConfigError(f"{key}=null: this setting needs a value. It takes {wanted}.")
    value = message.split("'")[1] if "'" in message else None
    said = f"{key}={value}: that is not {wanted}." if value is not None else f"{key} takes {wanted}."
    hint = ""
    declared = _field_type(key)
    if value and isinstance(declared, type) and issubclass(declared, StrEnum):
        hint = did_you_mean(value, list(declared), f"{key}={{}}")
    return ConfigError(said + hint)


def _field_type(key: str) -> Any:
    node: Any = RunConfig
    for part in key.split("."):
        if not is_dataclass(node) or part not in {f.name for f in fields(node)}:
            return None
        node = get_type_hints(node)[part]
    if get_origin(node) is UnionType:
        node = next(arg for arg in get_args(node) if arg is not type(None))
    return node


def _describe(declared: Any, key: str) -> str:
    if isinstance(declared, type) and issubclass(declared, StrEnum):
        return f"one of {', '.join(declared)}"
    if get_origin(declared) is list:
        return f"a list, such as {key}=[a,b]"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(declared, "a value of its declared type")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
