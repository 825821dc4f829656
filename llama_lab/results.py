"""What a run ends with: the numbers of result.json, a public contract."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
"""Version of result.json and run.json; raised when a key changes its meaning."""

OBJECTIVES = (
    "eval_loss",
    "perplexity",
    "exact_match",
    "composes",
    "reward_accuracy",
    "reward_margin",
    "reward",
    "train_loss",
    "tokens_per_s",
    "peak_memory_gib",
    "train_runtime_s",
)
"""The numbers that a sweep may use as its objective."""


@dataclass(kw_only=True)
class Score:
    """What held-out rows say of a model."""

    eval_loss: float
    """Mean next-token loss over the learned tokens of all held-out rows, nats a token; of a preference trainer its own
    loss, mean over the rows; NaN of prompts alone."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By name: exact_match, composes and reward_accuracy, shares from 0 to 1; reward_margin, in nats; reward,
    the mean worth of the answers by trainer.rewards."""
    answers: list[str] = field(default_factory=list)
    """The greedy answers that were scored, in the order of the held-out rows; empty where none were."""


@dataclass(kw_only=True)
class FitResult:
    """What training says of itself."""

    num_steps: int
    """Optimizer steps in all, those before a resume included."""
    train_loss: float
    """Mean of the logged training losses of this process, nats a token."""
    train_runtime_s: float
    """Seconds spent in training, those before a resume included; evaluation left out."""
    tokens_per_s: float
    """Real (unpadded) tokens a second, prompt and answer."""


@dataclass(kw_only=True)
class Result:
    """result.json of a run that ended well."""

    objective: float
    eval_loss_before: float | None
    eval_loss: float
    perplexity: float | None
    """None of a preference trainer, whose loss is not one of tokens."""
    train_loss: float
    train_runtime_s: float
    tokens_per_s: float
    peak_memory_gib: float
    """2**30 bytes: of the GPU where there is one, else of the process."""
    num_trainable_params: int
    num_params: int
    num_steps: int
    metrics_before: dict[str, float]
    metrics: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The flat object of result.json: the data set's metrics stand beside the rest, with `_before` for the base."""
        flat = {k: v for k, v in vars(self).items() if not isinstance(v, dict)}
        return flat | self.metrics | {f"{k}_before": v for k, v in self.metrics_before.items()}


def objective_of(result: Mapping[str, Any]) -> float:
    """What Hydra is told of a run: its objective by result.json, NaN where that has none."""
    objective = result.get("objective")
    return math.nan if objective is None else float(objective)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None
