"""How a study chooses and ends its trials: samplers and pruners by their short names, with typed options."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from llama_lab.errors import ConfigError

PREFIX = "hydra.sweeper."


class SamplerName(StrEnum):
    """How the next point is chosen (Optuna's samplers)."""

    tpe = "tpe"
    random = "random"
    nsgaii = "nsgaii"
    qmc = "qmc"
    gp = "gp"
    cmaes = "cmaes"


LEARN_NOTHING = (SamplerName.random, SamplerName.qmc)
"""What they draw does not depend on what other trials have found."""


class PrunerName(StrEnum):
    """Which trials are ended early (Optuna's pruners). Successive halving: arXiv 1810.05934; Hyperband: 1603.06560."""

    none = "none"
    median = "median"
    successive_halving = "successive_halving"
    hyperband = "hyperband"


SAMPLER_OPTIONS = {
    SamplerName.tpe: ("n_startup_trials", "n_ei_candidates", "multivariate"),
    SamplerName.random: (),
    SamplerName.nsgaii: ("population_size",),
    SamplerName.qmc: ("qmc_type",),
    SamplerName.gp: ("n_startup_trials",),
    SamplerName.cmaes: ("n_startup_trials",),
}
PRUNER_OPTIONS = {
    PrunerName.none: (),
    PrunerName.median: ("n_startup_trials", "n_warmup_steps", "interval_steps"),
    PrunerName.successive_halving: (
        "min_resource",
        "reduction_factor",
        "min_early_stopping_rate",
        "bootstrap_count",
    ),
    PrunerName.hyperband: ("min_resource", "max_resource", "reduction_factor", "bootstrap_count"),
}


DEFAULT_FACTORS = {PrunerName.successive_halving: 4, PrunerName.hyperband: 3}
"""reduction_factor where it is null: Optuna's."""


@dataclass(kw_only=True)
class SamplerSettings:
    """hydra/sweeper/sampler. An option that is null is left to Optuna; the names are Optuna's."""

    name: SamplerName = MISSING
    n_startup_trials: int | None = None
    """Trials that are drawn at random before the sampler learns."""
    n_ei_candidates: int | None = None
    """Of tpe: points that are drawn, of which the most promising is taken."""
    multivariate: bool | None = None
    """Model the settings together instead of one by one."""
    population_size: int | None = None
    """Of nsgaii: trials of a generation."""
    qmc_type: str | None = None
    """sobol or halton."""

    def options(self) -> dict[str, Any]:
        """What is set, by Optuna's names."""
        return _options(self, SAMPLER_OPTIONS[self.name])

    def __post_init__(self) -> None:
        _check_options(self, "sampler", SAMPLER_OPTIONS)
        for key in ("n_startup_trials", "n_ei_candidates", "population_size"):
            check_least(f"sampler.{key}", getattr(self, key), 0 if key == "n_startup_trials" else 2)
        if self.qmc_type not in (None, "sobol", "halton"):
            raise ConfigError(f"{PREFIX}sampler.qmc_type={self.qmc_type} is neither sobol nor halton.")


@dataclass(kw_only=True)
class PrunerSettings:
    """hydra/sweeper/pruner. Steps and resources are optimizer steps; an option that is null is left to Optuna."""

    name: PrunerName = MISSING
    n_startup_trials: int | None = None
    """Trials that must have ended before one is pruned."""
    n_warmup_steps: int | None = None
    """Of median: no trial is pruned before so many steps."""
    interval_steps: int | None = None
    """Of median: steps from one decision to the next."""
    min_resource: int | None = None
    """The first rung; null is the first measurement on the way."""
    max_resource: int | None = None
    """null is the trial's last step."""
    reduction_factor: int | None = None
    """One trial of so many goes on from a rung."""
    min_early_stopping_rate: int | None = None
    """The first rung is so many rungs later."""
    bootstrap_count: int | None = None
    """Trials that must have reached a rung before one goes on from it."""
    num_measurements: int = 8
    """Where trainer.eval_steps is null, the held-out loss is first measured after so much of a trial: one of so many
    steps. From there on halvings measure at their rungs, other pruners as often again."""

    def options(self) -> dict[str, Any]:
        """What is set, by Optuna's names."""
        return _options(self, PRUNER_OPTIONS[self.name])

    @property
    def factor(self) -> int | None:
        """How many times as many steps the next rung of a halving has; None where the pruner has no rungs."""
        return self.reduction_factor or DEFAULT_FACTORS.get(self.name)

    def first_step(self, num_steps: int) -> int:
        """The first measured step of a trial of so many, if it is on the way."""
        return num_steps if self.name is PrunerName.none else max(1, num_steps // self.num_measurements)

    def measured_steps(self, num_steps: int) -> list[int]:
        """All of them on the way: between the rungs of a halving, nothing is decided."""
        first, factor = self.first_step(num_steps), self.factor
        if factor is None:
            return list(range(first, num_steps, first))
        rungs, rung = [], (self.min_resource or first) * factor ** (self.min_early_stopping_rate or 0)
        while rung < num_steps:
            rungs.append(rung)
            rung *= factor
        return rungs

    def __post_init__(self) -> None:
        _check_options(self, "pruner", PRUNER_OPTIONS)
        for key, least in (
            ("n_startup_trials", 0),
            ("n_warmup_steps", 0),
            ("interval_steps", 1),
            ("min_resource", 1),
            ("max_resource", 1),
            ("reduction_factor", 2),
            ("min_early_stopping_rate", 0),
            ("bootstrap_count", 0),
            ("num_measurements", 2),
        ):
            check_least(f"pruner.{key}", getattr(self, key), least)


def _options(settings: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(settings, name)) is not None}


def _check_options(settings: Any, group: str, table: dict[Any, tuple[str, ...]]) -> None:
    for name in {option for options in table.values() for option in options} - set(table[settings.name]):
        if getattr(settings, name) is not None:
            owners = [str(owner) for owner, options in table.items() if name in options]
            raise ConfigError(
                f"{PREFIX}{group}.{name} belongs to {' and '.join(owners)}, and hydra/sweeper/{group} is "
                f"{settings.name}. Leave it out, or type hydra/sweeper/{group}={owners[0]}."
            )


def check_least(key: str, value: float | None, least: float) -> None:
    """Refuse a value of hydra.sweeper that is too small."""
    if value is not None and value < least:
        raise ConfigError(f"{PREFIX}{key}={value} is out of range: type at least {least}.")
