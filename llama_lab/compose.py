"""From words to checked settings: Hydra composes the tree, `parse` turns it into dataclasses and checks them."""

from collections.abc import Iterator
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from llama_lab.checks import check_combination, check_sources
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError, LlamaLabError
from llama_lab.explain import explain, known_keys, unknown_key
from llama_lab.paths import CONF_DIR

ConfigStore.instance().store(name="schema", node=RunConfig)


def parse(cfg: DictConfig) -> RunConfig:
    """Turn the composed tree into checked dataclasses, before any download or GPU work.

    Raises:
        ConfigError: a key that no group has, a value of the wrong type or out of range, settings that cannot work
            together, or a value that is missing.
        DataError: a local data file that is missing, empty or malformed.
    """
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
    check_sources(config)
    return config


def compose_words(words: list[str]) -> RunConfig:
    """Compose and check the run that `python -m llama_lab WORDS` would start; nothing is loaded or written.

    Inside a Hydra job, the job's own search path is used, so groups of the user's are known too.
    """
    try:
        if GlobalHydra.instance().is_initialized():
            cfg = compose("config", overrides=words)
        else:
            with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
                cfg = compose("config", overrides=words)
    except Exception as error:
        raise explain(error) from error
    return parse(cfg)


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys that `+key=value` smuggled past Hydra's own check.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    known = set(known_keys())
    for key in _keys_of(OmegaConf.to_container(cfg, resolve=False)):
        if key not in known:
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
