"""The few shapes that the micro-batches of a stack have on a GPU, where each new one is compiled or recorded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from llama_lab.engine.stream import RECORDING, chosen_sizes, next_size

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Slots that are computed, so that few are recorded and no more than a third of them idle."""


class Shapes:
    """Chosen from the rows that have joined; where nothing is recorded, every micro-batch has its own shape."""

    def __init__(self, num_rows: int, *, record: bool) -> None:
        self.num_rows, self.record = num_rows, record
        self.sizes: list[int] = []
        """Tokens of a row to which micro-batches are padded."""
        self.longest = 1
        """Tokens of the longest row."""
        self.segments = 0
        """Rows of a slot, those into which padding is cut included; none has had more."""
        self.width = 0
        """Slots that are computed."""
        self._widths: set[int] = set()

    def plan(self, longest: int, left: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
        """Make room for the rows that are trained from now on; returns the sizes that are new.

        Args:
            longest: tokens of the longest row of their data.
            left: tokens and rows of every micro-batch that each of them has left.
        """
        self.longest = max(self.longest, longest)
        if not self.record:
            return []
        micro_steps = list(zip_longest(*left, fillvalue=(0, 0)))
        wanted = [max(tokens for tokens, _ in micro_step) for micro_step in micro_steps]
        larger = [total for total in wanted if not self.sizes or total > self.sizes[-1]]
        new = chosen_sizes(larger, RECORDING // len(left)) if larger else []
        self.sizes += new
        for total, micro_step in zip(wanted, micro_steps, strict=True):
            size = self.size(total)
            self.hold(max(num_rows + self.num_cuts(size - tokens) for tokens, num_rows in micro_step))
        return new

    def hold(self, segments: int) -> None:
        """A slot has so many rows: recorded graphs must take as many."""
        self.segments = max(self.segments, segments)

    def num_cuts(self, padding: int) -> int:
        """Rows into which so much padding is cut."""
        return -(-padding // self.longest)

    def size(self, num_tokens: int) -> int:
        """To how many tokens a micro-batch of so many is padded."""
        return next_size(self.sizes, num_tokens) if self.record else num_tokens

    def num_starts(self) -> int:
        """Of the rows of all slots that are computed, where shapes are recorded."""
        return 1 + self.width * self.segments if self.record else 0

    def settle(self, num_live: int, num_left: int) -> int:
        """How many slots to compute for so many rows: fewer only where that pays, since each size is recorded again.

        Args:
            num_left: micro-steps until the last of them ends.
        """
        if not self.record:
            self.width = num_live
            return num_live
        want = next(width for width in self._allowed() if width >= num_live)
        if want > self.width or (want < self.width and self._pays(want, num_left)):
            self.width = want
        self._widths.add(self.width)
        return self.width

    def _allowed(self) -> list[int]:
        return [*(width for width in WIDTHS if width < self.num_rows), self.num_rows]

    def _pays(self, width: int, num_left: int) -> bool:
        saved = num_left * self.sizes[-1] * (self.width - width)
        return saved > (0 if width in self._widths else RECORDING * len(self.sizes))
