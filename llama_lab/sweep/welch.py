"""Welch's t test: are the means of two small samples with unequal variances the same?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

SIGNIFICANT = 0.05
"""Below this p value two means are called different."""


def welch_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p value of Welch's t test; NaN where one of the samples has less than two values."""
    if min(len(one), len(other)) < 2:
        return math.nan
    a, b = statistics.variance(one) / len(one), statistics.variance(other) / len(other)
    difference = abs(statistics.fmean(one) - statistics.fmean(other))
    if a + b == 0:
        return 1.0 if difference == 0 else 0.0
    degrees = (a + b) ** 2 / (a**2 / (len(one) - 1) + b**2 / (len(other) - 1))
    from scipy.special import stdtr  # scipy.stats has the whole test and takes half a second to import

    return float(2 * stdtr(degrees, -difference / math.sqrt(a + b)))
