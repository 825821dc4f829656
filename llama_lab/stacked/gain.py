"""What stacking is predicted to gain: what a step costs whatever it computes is paid once for all rows of a stack."""

from __future__ import annotations

FIXED_MS = 8.3
"""Of a step, however many rows and tokens it has."""
ROW_MS = 1.34
"""Of each row: LoRA products, losses and an optimizer of its own."""
TOKEN_MS = 0.0474
"""Of each token of a run alone ..."""
STACKED_TOKEN_MS = 0.0517
"""... and of one in a stack, whose adapters are padded to the largest rank.

Fitted to the step times of benchmarks/results/stacked.json: a Llama-2-7B in NF4 on an H100, ranks 8 to 64, 256 to 1,024
tokens a row, alone and 8 at a time; tests/unit/test_stacked.py holds the predictions beside them."""
FULL = 8_192
"""Tokens at once from which on nothing of a step is left to share."""
WORTH_IT = 1.05
"""A smaller predicted gain is none: it would be lost while rows end at different times."""


def step_ms(num_tokens: float, num_rows: int = 1) -> float:
    """A step of a run alone, or of a stack.

    Args:
        num_tokens: real tokens of a micro-batch of each row.
    """
    of_token = TOKEN_MS if num_rows == 1 else STACKED_TOKEN_MS
    return FIXED_MS + num_rows * (ROW_MS + of_token * num_tokens)


def tokens_per_s(num_tokens: float, num_rows: int = 1) -> float:
    """Speed of all rows together."""
    return 1000 * num_rows * num_tokens / step_ms(num_tokens, num_rows)


def predicted_gain(num_tokens: float, num_rows: int) -> float:
    """How much faster points are trained `num_rows` at a time than one by one."""
    return tokens_per_s(num_tokens, num_rows) / tokens_per_s(num_tokens)
