"""The settings of a study: hydra.sweeper of `hydra/sweeper=optuna`. Nothing here imports optuna."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.results import OBJECTIVES
from llama_lab.sweep.methods import PREFIX, PrunerName, PrunerSettings, SamplerSettings, check_least

TARGET = "hydra_plugins.llama_lab_sweeper.OptunaSweeper"
LARGER_IS_BETTER = ("exact_match", "composes", "reward_accuracy", "reward_margin", "reward", "tokens_per_s")
PRUNABLE = ("eval_loss", "perplexity")
"""Objectives that the held-out loss on the way speaks for."""


class Direction(StrEnum):
    """Which end of an objective is the good one."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(kw_only=True)
class SweepSettings:
    """hydra.sweeper: what is searched, how, and for how long."""

    _target_: str = TARGET
    study_name: str = "study"
    """The study's name in its storage, in W&B, and of its folder outputs/NAME."""
    storage: str | None = None
    """null is the file study.journal in the study's folder. Else a *.journal file, an SQLAlchemy address such as
    sqlite:///study.db or postgresql://USER@HOST/NAME, or grpc://HOST:PORT (Optuna's proxy)."""
    sampler: SamplerSettings = MISSING
    pruner: PrunerSettings = MISSING
    objectives: list[str] = field(default_factory=list)
    """Numbers of result.json; several make a Pareto front. Empty is the run's own `objective`."""
    direction: Any = None
    """minimize or maximize, or a list with one for each objective; null is what is good of that number."""
    constraints: dict[str, float] = field(default_factory=dict)
    """Largest value that a number of result.json may have: {peak_memory_gib: 24}. A trial beyond it is infeasible."""
    n_trials: int = 20
    """Trials of the study in all, those of earlier starts included."""
    n_jobs: int = 1
    """Trials at a time; 1 with hydra/launcher=stacked is one for each row of its stacks."""
    max_failure_rate: float = 0.5
    """The study stops when more of the trials of this start have failed, counted from the fifth on."""
    retries: int = 1
    """How often a trial whose process was killed is started again, from its last checkpoint."""
    seed: int = 0
    """Of the sampler. A study that is resumed draws what it would have drawn."""
    params: dict[str, Any] = field(default_factory=dict)
    """The search space: setting or group -> choice(...), range(...), interval(...), tag(log, interval(...)), or a list
    of choices. Words of the command line go over it."""
    multiples: dict[str, str] = field(default_factory=dict)
    """{lora.alpha: lora.r}: what is drawn for lora.alpha is a factor of lora.r."""
    only_if: dict[str, Any] = field(default_factory=dict)
    """{quant.double_quant: {quant: [nf4, fp4]}}: a setting that is drawn only where another has one of these values."""
    baselines: list[Any] = field(default_factory=list)
    """Points that are tried first: [{lora.r: 16, trainer.learning_rate: 2e-4}]; what they leave out is drawn."""
    confirm: int = 0
    """So many of the best are trained again with other seeds, to see whether the first is better than the second."""
    confirm_seeds: int = 3
    """Seeds of each of them."""
    heartbeat_s: float = 15.0
    """Seconds between two signs of life of a trial."""
    grace_s: float = 90.0
    """Silence after which a trial of another machine counts as abandoned; one of this machine is known to be."""

    def __post_init__(self) -> None:
        for key, least in (("n_trials", 1), ("n_jobs", 1), ("retries", 0), ("seed", 0), ("confirm", 0)):
            check_least(key, getattr(self, key), least)
        check_least("confirm_seeds", self.confirm_seeds, 2)
        if not 0 <= self.max_failure_rate <= 1:
            raise ConfigError(f"{PREFIX}max_failure_rate={self.max_failure_rate}: type a share from 0 to 1.")
        if not 0 < self.heartbeat_s < self.grace_s:
            raise ConfigError(f"{PREFIX}heartbeat_s={self.heartbeat_s:g}: type more than 0 and less than grace_s.")
        if not self.study_name.strip() or set(self.study_name) & set("/\\\0") or self.study_name.startswith("."):
            raise ConfigError(f"{PREFIX}study_name={self.study_name}: type a name that a folder can have.")
        for name in self.objectives:
            check_objective(name)
        if twice := next((name for name in self.objectives if self.objectives.count(name) > 1), None):
            raise ConfigError(f"{PREFIX}objectives names {twice} twice. Type it once.")
        for name, limit in self.constraints.items():
            check_objective(name, f"{PREFIX}constraints")
            if not math.isfinite(limit):
                raise ConfigError(f"{PREFIX}constraints.{name}={limit}: a limit is a finite number.")
        for point in self.baselines:
            if not isinstance(point, dict):
                raise ConfigError(f"{PREFIX}baselines holds {point}. A point reads {{lora.r: 16}}.")

    def directions(self, objectives: list[str]) -> list[Direction]:
        """One direction for each objective.

        Raises:
            ConfigError: `direction` is no direction, or there are not as many as objectives.
        """
        if self.direction is None:
            return [Direction.maximize if name in LARGER_IS_BETTER else Direction.minimize for name in objectives]
        words = self.direction if isinstance(self.direction, list) else [self.direction]
        for word in words:
            if word not in list(Direction):
                raise ConfigError(
                    f"{PREFIX}direction={word} is no direction.{did_you_mean(str(word), list(Direction))} "
                    "Type minimize or maximize."
                )
        if len(words) != len(objectives):
            raise ConfigError(
                f"{PREFIX}direction has {len(words)} and {PREFIX}objectives {len(objectives)} entries. Type one "
                "direction for each objective, or leave direction out."
            )
        return [Direction(word) for word in words]


def sweep_settings(node: DictConfig) -> SweepSettings:
    """hydra.sweeper as a checked dataclass.

    Raises:
        ConfigError: a value out of range, or settings that do not go together.
    """
    plain = OmegaConf.to_container(node, resolve=True)
    merged = OmegaConf.merge(OmegaConf.structured(SweepSettings), plain)
    return cast(SweepSettings, OmegaConf.to_object(merged))


def check_pruner(settings: SweepSettings, objectives: list[str], directions: list[Direction]) -> None:
    """Refuse a pruner where the held-out loss on the way does not speak for the objective.

    Raises:
        ConfigError: several objectives, or one that is no loss.
    """
    name = settings.pruner.name
    if name is PrunerName.none:
        return
    if len(objectives) > 1:
        raise ConfigError(
            f"hydra/sweeper/pruner={name} needs one objective, and there are {len(objectives)}. Type "
            "hydra/sweeper/pruner=none."
        )
    if objectives[0] not in PRUNABLE or directions[0] is not Direction.minimize:
        raise ConfigError(
            f"hydra/sweeper/pruner={name} compares held-out losses, and the objective is to {directions[0]} "
            f"{objectives[0]}. Type hydra/sweeper/pruner=none, or objective=eval_loss."
        )


def check_objective(name: str, key: str = f"{PREFIX}objectives") -> None:
    """Refuse a name that is no number of result.json; `key` is the setting that holds it."""
    if name not in OBJECTIVES:
        raise ConfigError(
            f"{key}: {name} is no number of result.json.{did_you_mean(name, OBJECTIVES)} "
            f"It can be: {', '.join(OBJECTIVES)}."
        )


def register() -> None:
    """Make the schema known to Hydra as hydra/sweeper/schema."""
    ConfigStore.instance().store(group="hydra/sweeper", name="schema", node=SweepSettings)
