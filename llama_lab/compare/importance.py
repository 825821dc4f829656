"""How much each setting mattered: PED-ANOVA (arXiv 2304.10255), as a study tells it at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llama_lab.compare.rows import Row, companions, larger_is_better
from llama_lab.results import number
from llama_lab.sweep.importance import ENOUGH, shares


def importances(rows: Sequence[Row], key: str, settings: Sequence[str]) -> dict[str, float]:
    """Shares of 1 by setting, the largest first; empty where too few rows have ended well to say anything.

    Settings that go with another one are left out, and so is the seed.
    """
    import optuna

    follows = {name for names in companions(rows, settings).values() for name in names}
    names = [name for name in settings if name not in follows and name != "seed"]
    able = [row for row in rows if row.rank is not None]
    if len(able) < ENOUGH or not names:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sign = -1.0 if larger_is_better(rows, key) else 1.0
    values = {name: [row.value(name) for row in able] for name in names}
    distributions = {name: _distribution(found) for name, found in values.items()}
    study = optuna.create_study()
    for at, row in enumerate(able):
        point = {name: _as_param(found[at], distributions[name]) for name, found in values.items()}
        study.add_trial(
            optuna.trial.create_trial(params=point, distributions=distributions, value=sign * row.numbers[key].mean)
        )
    return shares(study, len(able))


def _distribution(values: Sequence[Any]) -> Any:
    """Numbers lie on a scale, by their logarithm where they span a decade; all else are choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(number(value) is not None for value in values):
        low, high = float(min(values)), float(max(values))
        return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)
    return CategoricalDistribution(sorted({json.dumps(value, default=str) for value in values}))


def _as_param(value: Any, distribution: Any) -> Any:
    return json.dumps(value, default=str) if hasattr(distribution, "choices") else float(value)
