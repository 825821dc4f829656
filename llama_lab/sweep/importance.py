"""How much each setting mattered, by PED-ANOVA (arXiv 2304.10255): of trials, or of rows that are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

NUM_TOP = 5
"""The best that say how much each setting mattered, at least; Optuna's advice for PED-ANOVA."""
ENOUGH = 3 * NUM_TOP
"""Trials or rows from which on it is said; of fewer it would be chance."""


def shares(study: Study, num_able: int, cost_of: Callable[[FrozenTrial], float] | None = None) -> dict[str, float]:
    """Shares of 1 by setting, the largest first; empty where all values are the same.

    Args:
        num_able: trials that have a value.
        cost_of: what is small for a good trial; None for its value.
    """
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, NUM_TOP / num_able))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that low values are the good ones
        try:
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=cost_of))
        except (ValueError, RuntimeError):
            return {}
