"""What stacking is predicted to gain: a GPU that is not full of one run's tokens trains several in little more time."""

from __future__ import annotations

import math
from bisect import bisect_right

MEASURED = ((238, 6_797), (1_004, 13_750), (2_030, 15_494), (8_152, 16_610))
"""Tokens a micro-batch, and the tokens/s of a single run with them: a Llama-2-7B in NF4 on an H100.
Source: benchmarks/results/speed.json, the cases 256 to 8192 at trainer.memory=fast."""
FULL = 8_192
"""Tokens at once from which on a GPU trains no faster."""
LORA_SHARE = 0.01
"""Of the speed, lost with each further row: its LoRA products are small ones of its own."""
WORTH_IT = 1.05
"""A smaller predicted gain is none: it would be lost while rows end at different times."""


def tokens_per_s(num_tokens: float) -> float:
    """Speed of a single run with so many tokens at once, interpolated over the logarithm of the tokens."""
    places, speeds = zip(*MEASURED, strict=True)
    if num_tokens <= places[0]:
        return speeds[0] * num_tokens / places[0]  # a step takes as long as one with more tokens
    if num_tokens >= places[-1]:
        return float(speeds[-1])
    i = bisect_right(places, num_tokens)
    share = math.log(num_tokens / places[i - 1]) / math.log(places[i] / places[i - 1])
    return speeds[i - 1] + share * (speeds[i] - speeds[i - 1])


def predicted_gain(num_tokens: float, num_rows: int) -> float:
    """How much faster points are trained `num_rows` at a time than one by one.

    Args:
        num_tokens: real tokens of a micro-batch of one point.
    """
    alone, together = tokens_per_s(num_tokens), tokens_per_s(num_rows * num_tokens)
    return together / alone * (1 - LORA_SHARE * (num_rows - 1))
