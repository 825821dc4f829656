"""Optuna's samplers and pruners by their short names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from llama_lab.sweep.methods import PrunerName, PrunerSettings, SamplerName, SamplerSettings

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

SAMPLERS = {
    SamplerName.tpe: "TPESampler",
    SamplerName.random: "RandomSampler",
    SamplerName.nsgaii: "NSGAIISampler",
    SamplerName.qmc: "QMCSampler",
    SamplerName.gp: "GPSampler",
    SamplerName.cmaes: "CmaEsSampler",
}
PRUNERS = {
    PrunerName.none: "NopPruner",
    PrunerName.median: "MedianPruner",
    PrunerName.hyperband: "HyperbandPruner",
}


def make_sampler(settings: SamplerSettings, seed: int, number: int) -> BaseSampler:
    """The sampler that draws the trial of that number.

    Each trial has one of its own with a seed of its own, so a study that was killed draws what it would have drawn. The
    points of a low-discrepancy sequence hang together, so there all trials share a seed.
    """
    from optuna import samplers

    own = seed if settings.name is SamplerName.qmc else (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():  # of options that Optuna calls experimental
        warnings.simplefilter("ignore")
        sampler: BaseSampler = getattr(samplers, SAMPLERS[settings.name])(**settings.options(), seed=own)
    return sampler


def make_pruner(settings: PrunerSettings, first_step: int, last_step: int) -> BasePruner:
    """The pruner of a study.

    Args:
        first_step: the step of the first measurement on the way, from 1; the smallest rung where none is set.
        last_step: the steps of a whole trial.
    """
    from optuna import pruners

    options: dict[str, Any] = settings.options()
    if settings.name in (PrunerName.successive_halving, PrunerName.hyperband):
        options.setdefault("min_resource", first_step)
    if settings.name is PrunerName.hyperband:
        options.setdefault("max_resource", max(last_step, options["min_resource"]))
    if settings.name is PrunerName.successive_halving:
        from llama_lab.sweep.halving import Halving

        return Halving(**options)
    pruner: BasePruner = getattr(pruners, PRUNERS[settings.name])(**options)
    return pruner
