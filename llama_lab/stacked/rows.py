"""How many rows a stack gets: what was asked for, what fits, and whether it pays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llama_lab.cards import USABLE_SHARE
from llama_lab.choices import Memory
from llama_lab.config import RunConfig
from llama_lab.engine.suits import allowed_memory
from llama_lab.errors import ConfigError
from llama_lab.memory import estimate_fast, rows_at_once
from llama_lab.params import ModelShape
from llama_lab.stacked.gain import FULL, WORTH_IT, predicted_gain, tokens_per_s
from llama_lab.sweep.slots import gpu_memory_gib

AUTO = "auto"
MOST = 8
"""Rows that `auto` takes at most."""


@dataclass(frozen=True, kw_only=True)
class Stacking:
    """How the points of one kind are trained."""

    num_rows: int | None
    """At a time on one base; None where each point has a process of its own, one after the other."""
    said: str
    """Why, in one line."""


def check_no_stages(stages: Any) -> None:
    """Refuse an experiment of several stages.

    Raises:
        ConfigError: there are stages.
    """
    if stages:
        raise ConfigError(
            "hydra/launcher=stacked trains one run a point, and this experiment has several stages. "
            "Leave hydra/launcher=stacked out: the points are then run one after the other."
        )


def check_rows(value: Any) -> int | None:
    """hydra.launcher.rows as a number; None for auto.

    Raises:
        ConfigError: it is neither.
    """
    if value == AUTO:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ConfigError(
        f"hydra.launcher.rows={value}: type how many points are trained together, such as hydra.launcher.rows=8, "
        "or hydra.launcher.rows=auto for what fits and pays."
    )


def stacking(
    wanted: int | None, config: RunConfig, rank: int, gpu: str | None, *, num_points: int | None = None
) -> Stacking:
    """How points like this one are trained: so many together as was asked for, or as fit and pay.

    Args:
        wanted: None for auto.
        rank: of the stack.
        gpu: that the stack has; None where it computes on the CPU.
        num_points: there are no more of them; None where nobody knows.
    """
    if wanted == 1 or num_points == 1:
        return Stacking(num_rows=None, said="one by one, as asked for" if wanted == 1 else "there is but one")
    if wanted is not None and num_points is not None:
        wanted = min(wanted, num_points)
    if gpu is None:
        if wanted is None:
            return Stacking(
                num_rows=None, said="one by one, as one run fills a CPU; hydra.launcher.rows=4 stacks anyway"
            )
        return Stacking(num_rows=wanted, said=f"{wanted} rows at a time as asked for; on a CPU no gain is predicted")
    num_tokens, longest, shape = _sizes(config)
    if wanted is not None:
        return predicted(num_tokens, wanted)
    most, room = num_points or MOST, USABLE_SHARE * gpu_memory_gib(gpu)
    if shape is None:
        return predicted(num_tokens, min(most, MOST))
    if largest_stack(shape, config, rank, length=longest, room_gib=room, most=2) == 1:
        return Stacking(num_rows=None, said=f"one by one, as two rows at a time do not fit in {room:.0f} GiB")
    best = best_rows(shape, config, rank, num_tokens=num_tokens, length=longest, room_gib=room, most=most)
    return predicted(num_tokens, best)


def best_rows(
    shape: ModelShape,
    config: RunConfig,
    rank: int,
    *,
    num_tokens: float,
    length: int,
    room_gib: float,
    most: int = MOST,
) -> int:
    """What `auto` takes: of the rows that fit those with the largest predicted gain.

    Args:
        num_tokens: real tokens of a micro-batch of one row.
        length: tokens of the longest row of the data.
    """
    most = min(most, MOST, math.ceil(FULL / num_tokens))
    fitting = largest_stack(shape, config, rank, length=length, room_gib=room_gib, most=most)
    return max(range(1, fitting + 1), key=lambda rows: predicted_gain(num_tokens, rows))


def predicted(num_tokens: float, num_rows: int) -> Stacking:
    """So many rows together where that is predicted to pay, else one by one; and the prediction."""
    gain = predicted_gain(num_tokens, num_rows)
    alone = f"one by one {tokens_per_s(num_tokens):,.0f} tokens/s with {num_tokens:,.0f} tokens at once"
    source = f"{alone}; by a 7B's numbers on an H100, benchmarks/results/stacked.json"
    if num_rows == 1 or gain < WORTH_IT:
        return Stacking(
            num_rows=None, said=f"one by one, as {max(num_rows, 2)} rows at a time would gain nothing ({source})"
        )
    return Stacking(num_rows=num_rows, said=f"{num_rows} rows at a time, predicted gain {gain:.2f}x ({source})")


def largest_stack(shape: ModelShape, config: RunConfig, rank: int, *, length: int, room_gib: float, most: int) -> int:
    """The most rows, at least 1, that are predicted to fit in the room at trainer.memory=balanced, or as asked for."""
    allowed = allowed_memory(config)
    levels = [Memory.balanced, Memory.lean] if len(allowed) > 1 else list(allowed)
    for level in levels:
        for rows in range(most, 1, -1):
            found = estimate_fast(shape, config, level, length=length, num_rows=rows, rank=rank)
            if found.total <= room_gib:
                return rows
    return 1


def _sizes(config: RunConfig) -> tuple[float, int, ModelShape | None]:
    """Mean real tokens of a micro-batch, tokens of the longest row, and the model's shape."""
    from llama_lab.plan import planned
    from llama_lab.process import prepare

    prepare(config)
    made = planned(config)
    if made.schedule is None:
        return rows_at_once(config.trainer) * config.dataset.max_length, config.dataset.max_length, made.shape
    return made.schedule.num_real_tokens / made.schedule.num_batches, made.longest, made.shape
