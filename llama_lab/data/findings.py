"""What a check of rows found, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 5
"""So many of the bad rows are named."""


class Level(StrEnum):
    """How bad a finding is: a failure stops the run."""

    ok = "ok"
    warning = "warning"
    failure = "failure"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, and what came out."""

    level: Level
    check: str
    message: str


def some(rows: NDArray[np.int64], total: int, kind: str) -> str:
    """How many rows of a kind, and the numbers of the first."""
    named = ", ".join(map(str, rows[:SHOWN]))
    return f"{len(rows):,} of {total:,} {kind} rows ({named}{', ...' if len(rows) > SHOWN else ''})"
