"""From words to checked settings: Hydra composes the tree, `parse` turns it into dataclasses and checks them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, product
from math import prod
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llama_lab.checks import check_combination, check_sources
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, LlamaLabError
from llama_lab.explain import explain
from llama_lab.known_keys import known_keys, unknown_key
from llama_lab.paths import CONF_DIR
from llama_lab.words import check_values

ConfigStore.instance().store(name="schema", node=RunConfig)

MAX_CHECKED_RUNS = 32
"""Of a larger grid every value is checked, but not every combination: Hydra composes each run a second time anyway."""


def parse(cfg: DictConfig) -> RunConfig:
    """Turn the composed tree into checked dataclasses, before any download or GPU work.

    Raises:
        ConfigError: a key that no group has, a value of the wrong type or out of range, settings that cannot work
            together, or a value that is missing.
        ModelError: a base model that is plainly not there.
        DataError: a local data file that is missing, empty or malformed.
    """
    config = _settings_of(cfg)
    check_sources(config)
    return config


def typed_words(config: DictConfig, kind: str) -> list[str]:
    """The words of the command line as they were typed: an interpolation in one is resolved where it stands.

    Args:
        config: the whole tree.
        kind: `task`, or `hydra` for those that are Hydra's own.
    """
    return cast(list[str], OmegaConf.to_container(config.hydra.overrides[kind], resolve=False))


def searchpath_words(config: DictConfig) -> list[str]:
    """The words that tell Hydra where the user's groups lie."""
    return [word for word in typed_words(config, "hydra") if word.startswith("hydra.searchpath")]


def compose_words(words: list[str]) -> RunConfig:
    """Compose and check the run that `python -m llama_lab WORDS` would start; nothing is loaded or written.

    Inside a Hydra job, the job's own search path is used, so groups of the user's are known too.
    """
    return parse(compose_tree(words))


def check_grid(words: list[str], config_name: str) -> None:
    """Compose and check the runs of a grid before the first one starts. Call it inside a Hydra job.

    Args:
        words: settings with several values, such as lora.r=8,16; the grid is their product.
    Raises:
        LlamaLabError: what is wrong with the first run that cannot be right.
    """
    check_runs(_runs_of(words), config_name)


def check_runs(runs: Iterable[Sequence[str]], config_name: str) -> list[RunConfig]:
    """Compose and check runs by their words before the first one starts. Call it inside a Hydra job.

    Raises:
        LlamaLabError: what is wrong with the first run that cannot be right.
    """
    configs: list[RunConfig] = []
    for run in runs:
        config = _settings_of(compose_tree(list(run), config_name))
        if not any((config.model, config.dataset) == (c.model, c.dataset) for c in configs):
            check_sources(config)  # a large file is read once
        if config.stages:
            from llama_lab.stages import stages_of  # it composes with what is here

            stages_of(config, list(run))
        configs.append(config)
    return configs


def _runs_of(words: list[str]) -> Iterable[tuple[str, ...]]:
    """The runs of a grid; of a large one so many that every value comes once."""
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        choices = [_values_of(override) for override in parser.parse_overrides(words)]
    except HydraException as error:
        raise explain(error) from error
    if prod(map(len, choices)) <= MAX_CHECKED_RUNS:
        return product(*choices)
    longest = max(map(len, choices))
    return zip(*(islice(cycle(values), longest) for values in choices), strict=True)


def _values_of(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        check_values(override)
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    return [str(override.input_line)]


def compose_tree(words: list[str], config_name: str = "config") -> DictConfig:
    """The tree that Hydra composes of the words, unchecked.

    Raises:
        LlamaLabError: Hydra cannot compose it.
    """
    try:
        if GlobalHydra.instance().is_initialized():
            return compose(config_name, overrides=words)
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return compose(config_name, overrides=words)
    except Exception as error:
        raise explain(error) from error


def _settings_of(cfg: DictConfig) -> RunConfig:
    """The tree as checked dataclasses; model and data set are not looked for."""
    try:
        check_keys(cfg)
        check_missing(cfg)
        OmegaConf.resolve(cfg)
        config = cast(RunConfig, OmegaConf.to_object(cfg))
    except LlamaLabError:
        raise
    except Exception as error:
        raise explain(error) from error
    check_combination(config)
    return config


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that `+key=value` smuggled past Hydra's own check.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    known = set(known_keys())
    groups = {key.rpartition(".")[0] for key in known}  # what stands below any other key is its value
    for key in _keys_of(OmegaConf.to_container(cfg, resolve=False)):
        if key not in known and key.rpartition(".")[0] in groups:
            raise unknown_key(key)


def check_missing(cfg: DictConfig) -> None:
    """Refuse a tree with a value that only the user can give.

    Raises:
        ConfigError: names the first missing key.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value. Type {missing[0]}=VALUE.")


def _keys_of(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield f"{prefix}{name}"
            yield from _keys_of(value, f"{prefix}{name}.")
