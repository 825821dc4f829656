"""What a study is, read from Hydra's tree and checked before the first trial: a typo ends here, not after an hour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from llama_lab.checks import form_of_file
from llama_lab.choices import DataFormat
from llama_lab.compose import check_runs, searchpath_words
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError
from llama_lab.lock import UNLOCKED
from llama_lab.own_settings import SAMPLING
from llama_lab.preference_checks import measuring
from llama_lab.sweep.dimension import Value
from llama_lab.sweep.settings import Direction, SweepSettings, check_pruner, sweep_settings
from llama_lab.sweep.space import Space, parse_space
from llama_lab.sweep.storage import storage_address


@dataclass(frozen=True, kw_only=True)
class Design:
    """A study before its first trial."""

    settings: SweepSettings
    space: Space
    objectives: list[str]
    directions: list[Direction]
    baselines: list[dict[str, Value]]
    folder: Path
    storage: str
    """Address for `open_storage`."""
    identity: dict[str, Any]
    """What a later start must share to go on with the study."""
    config_name: str
    searchpath: list[str]
    """Words that tell Hydra where the user's groups lie."""
    own_folders: list[str]
    """Folders of the user's groups."""


def design_of(config: DictConfig, arguments: Sequence[str], config_loader: ConfigLoader | None) -> Design:
    """The study that Hydra's tree and the words of the command line describe.

    Args:
        config: the whole tree, composed without the words that stand for several values.
        arguments: the words of the command line that are the task's.
    Raises:
        ConfigError: a setting of hydra.sweeper or a word of the space that cannot be right.
    """
    settings = sweep_settings(config.hydra.sweeper)
    space = parse_space(
        settings.params,
        arguments,
        multiples=settings.multiples,
        only_if=settings.only_if,
        config_loader=config_loader,
    )
    if not space.dimensions:
        raise ConfigError(
            "The study has nothing to choose. Type search=lora_quant, or what is searched: 'lora.r=choice(8,16,32)' "
            "'trainer.learning_rate=tag(log,interval(3e-5,1e-3))'."
        )
    objectives = settings.objectives or [str(config.objective)]
    directions = settings.directions(objectives)
    check_pruner(settings, objectives, directions)
    if settings.confirm and len(objectives) > 1:
        raise ConfigError("hydra.sweeper.confirm needs one objective. Type hydra.sweeper.confirm=0.")
    folder = Path(str(config.hydra.sweep.dir))
    subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index, call-overload]
    if "job." not in str(subdir):
        raise ConfigError(
            f"hydra.sweep.subdir={subdir} is one folder for all trials. Leave it out, or put their number into it: "
            "'hydra.sweep.subdir=${hydra.job.num}'"
        )
    return Design(
        settings=settings,
        space=space,
        objectives=objectives,
        directions=directions,
        baselines=[space.check_baseline(point) for point in settings.baselines],
        folder=folder,
        storage=storage_address(settings.storage, folder),
        identity=_identity(config, space, objectives, settings),
        config_name=str(config.hydra.job.config_name or "config"),
        own_folders=[s.path for s in config.hydra.runtime.config_sources if _is_own(s)],
        searchpath=searchpath_words(config),
    )


def check_design(design: Design) -> list[RunConfig]:
    """Compose and check runs that have every choice and both ends of every interval once. Call it inside a Hydra job.

    Raises:
        LlamaLabError: what is wrong with the first run that cannot be right.
    """
    runs = [[*design.searchpath, *words] for words in design.space.check_points()]
    configs = check_runs(runs, design.config_name)
    if any(config.stages for config in configs):
        raise ConfigError(
            "A study searches one run, and this experiment has several stages. Search one of them, such as -m "
            "search=lora_quant trainer=dpo dataset=sample_preference model.adapter=outputs/DATE/TIME."
        )
    for name in dict.fromkeys((*design.objectives, *design.settings.constraints)):
        what = "an objective" if name in design.objectives else "a constraint"
        if name in ("exact_match", "composes") and any(name not in c.dataset.metrics for c in configs):
            raise ConfigError(f"{name} is {what} and not measured. Type dataset.metrics=[{name}] as well.")
        trainers = measuring(name)
        if other := next((c.trainer.name for c in configs if c.trainer.name not in trainers), None):
            raise ConfigError(
                f"{name} is {what}, and trainer={other} does not measure it. Type trainer={'|'.join(trainers)}."
            )
        if name == "eval_loss" and any(c.trainer.name in SAMPLING and _are_prompts_alone(c) for c in configs):
            raise ConfigError(
                f"eval_loss is {what}, and rows that are prompts alone have none. Type objective=reward "
                "hydra/sweeper/pruner=none"
            )
    return configs


def _are_prompts_alone(config: RunConfig) -> bool:
    return form_of_file(config.dataset, config.trainer.name) is DataFormat.prompt


def _identity(config: DictConfig, space: Space, objectives: list[str], settings: SweepSettings) -> dict[str, Any]:
    """Settings that all trials share, the space, and what is measured; as it comes back from JSON."""
    keys = [dimension.key.lstrip("+") for dimension in space.dimensions]
    shared = {
        key: value
        for key, value in flat(OmegaConf.to_container(config, resolve=False, enum_to_str=True)).items()
        if not any(is_below(key, ignored) for ignored in (*keys, *UNLOCKED, "hydra", "generation", "objective"))
    }
    space_now = {f"search of {name}": what for name, what in space.describe().items()}
    rest = {"objectives": objectives, "constraints": settings.constraints}
    identity: dict[str, Any] = json.loads(json.dumps(shared | space_now | rest))
    return identity


def _is_own(source: DictConfig) -> bool:
    return source.schema == "file" and source.provider not in ("hydra", "main", "schema")


def is_below(key: str, group: str) -> bool:
    """Whether a setting is a group, or in it."""
    return key == group or key.startswith(f"{group}.")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts by dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
