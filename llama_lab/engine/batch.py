"""The streams of all adapters as one micro-batch of the device: padded to one length, one behind the other.

K adapters, P adapted layers of all blocks, W words of a dropout key, N tokens of each adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_lab.data.templates import IGNORED
from llama_lab.engine.stream import Stream


@dataclass(kw_only=True)
class Batch:
    """A micro-batch on the host; pinned where a GPU copies it by itself."""

    tokens_3KN: Tensor
    """Ids; the token after each, IGNORED where nothing is learned; positions."""
    starts: Tensor
    """int32; first places of the rows, padding included, then the end again and again."""
    spans: list[tuple[int, int]]
    """The same without the end."""
    longest: int
    """No row is longer."""
    keys_PKW: Tensor
    share_K: Tensor
    """What one learned token counts in the loss."""


def joined(
    streams: Sequence[Stream | None], *, size: int, longest: int, num_starts: int = 0, pin: bool = False
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Tokens (3, K, N), starts and spans of a Batch; the losses do not depend on the padding.

    Args:
        streams: one of each adapter; None for an empty slot, which is all padding.
        size: N.
        longest: no row is longer, and padding is cut into rows of it.
        num_starts: so many at least.
    """
    tokens_3KN = torch.zeros(3, len(streams), size, dtype=torch.int64, pin_memory=pin)
    tokens_3KN[1].fill_(IGNORED)
    spans: list[tuple[int, int]] = []
    for k, stream in enumerate(streams):
        num_tokens = 0 if stream is None else stream.num_tokens
        if stream is not None:
            tokens_3KN[:, k, :num_tokens] = stream.tokens
        cuts = cut(size - num_tokens, longest)
        start = num_tokens
        for length in cuts:
            tokens_3KN[2, k, start : start + length] = torch.arange(length)
            start += length
        start = k * size
        for length in [*(stream.lengths if stream else []), *cuts]:
            spans.append((start, start + length))
            start += length
    ends = [end for _, end in spans]
    ends += [len(streams) * size] * (num_starts - 1 - len(ends))
    starts = torch.tensor([0, *ends], dtype=torch.int32)
    return tokens_3KN, starts.pin_memory() if pin else starts, spans


def cut(padding: int, longest: int) -> list[int]:
    """Lengths of the rows into which so much padding is cut."""
    whole, rest = divmod(padding, longest)
    return [longest] * whole + ([rest] if rest else [])
