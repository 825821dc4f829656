"""Rows to streams: the rows of a micro-batch one behind the other; and the few lengths to which streams are padded."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from llama_lab.data.batches import labels_of, lengths_of
from llama_lab.data.templates import IGNORED

AHEAD = 4
"""Streams that are made while the GPU works."""
STEP = 64
"""Tokens to whose multiples streams are padded: products of other sizes are slower."""
RECORDING = 20_000
"""Tokens that an H100 trains a 7B on while it records one length (1.2 s: benchmarks/results/speed.json)."""


@dataclass(kw_only=True)
class Stream:
    """One micro-batch of one adapter on the host, without padding."""

    tokens: Tensor
    """(3, N): ids; the token after each, IGNORED where nothing is learned; positions."""
    lengths: list[int]
    """Tokens of each row."""
    num_learned: int
    """Labels that are not ignored, without the first of each row, which nothing predicts."""

    @property
    def num_tokens(self) -> int:
        """All of them are real ones."""
        return self.tokens.shape[1]


def stream_of(rows: list[dict[str, Any]]) -> Stream:
    """Rows with columns input_ids and labels, and seq_lengths where they are packed."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in labels_of(row)]
    lengths = [length for row in rows for length in lengths_of(row)]
    num_learned = sum(label != IGNORED for label in labels)
    places = [place for length in lengths for place in range(length)]
    return Stream(tokens=torch.tensor([ids, [*labels[1:], IGNORED], places]), lengths=lengths, num_learned=num_learned)


def chosen_sizes(totals: Sequence[int], cost: int = RECORDING) -> list[int]:
    """The lengths to which micro-batches of so many tokens are padded, so that padding and recordings cost least.

    Args:
        totals: tokens of every micro-batch of the run.
        cost: tokens that could be trained on while one length is recorded.
    """
    wanted = Counter(-(-total // STEP) * STEP for total in totals)
    sizes = sorted(wanted)
    # best[i]: least cost of the i smallest sizes when the last of them is a chosen one, and where the one before ends
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, len(sizes) + 1):
        found, padding = [], 0
        for j in range(i - 1, -1, -1):
            padding += wanted[sizes[j]] * (sizes[i - 1] - sizes[j])
            found.append((best[j][0] + padding + cost, j))
        best.append(min(found))
    chosen, i = [], len(sizes)
    while i:
        chosen.append(sizes[i - 1])
        i = best[i][1]
    return chosen[::-1]


def next_size(sizes: Sequence[int], num_tokens: int) -> int:
    """The smallest of `sizes` that holds so many tokens."""
    return sizes[bisect_left(sizes, num_tokens)]


def made_ahead(make: Callable[[list[int]], Any], batches: Iterable[list[int]]) -> Generator[Any, None, None]:
    """What `make` gives for each batch, made by another thread; its errors are raised here."""
    queue: Queue[tuple[str, Any]] = Queue(maxsize=AHEAD)
    stopped = threading.Event()

    def work() -> None:
        try:
            for batch in batches:
                queue.put(("made", make(batch)))
                if stopped.is_set():
                    return
            queue.put(("end", None))
        except BaseException as error:
            queue.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        while not queue.empty():
            queue.get_nowait()
