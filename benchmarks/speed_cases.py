"""The cases of speed_gpu.py: words for our runs, arguments for the peers'."""

from __future__ import annotations

import math
import random

SWEPT_TOKENS = 2048
"""A step of the cases of a sweep that differ in rank or quant type; "tokens 2048" is their rank 16 and NF4."""
ALL_LINEAR = ("lora=all_linear", "lora.r=16", "lora.dropout=0.05", "quant=nf4")
QV = ("lora=attention", "lora.r=8", "lora.dropout=0.05", "quant=nf4")

Case = tuple[str, list[str]]
"""Its name, and the words of the run."""


def packed(num_tokens: int) -> list[str]:
    """Words for so many tokens a step."""
    length = min(num_tokens, 1024)
    return [f"dataset.max_length={length}", f"trainer.per_device_train_batch_size={num_tokens // length}"]


def cases() -> list[Case]:
    """The targets of the fast engine, and of the leanest memory."""
    found = [(f"{n}", [*ALL_LINEAR, "trainer.memory=fast", *packed(n)]) for n in (256, 1024, 2048, 8192)]
    found += [(f"{n}, lean", [*ALL_LINEAR, "trainer.memory=lean", *packed(n)]) for n in (1024, 2048, 8192)]
    return [*found, ("1024, lean, q and v", [*QV, "trainer.memory=lean", *packed(1024)])]


def sweep() -> list[Case]:
    """What tokens a step, rank and quant type cost, trainer.memory=auto; the ends of each first, as time may run out.

    int8 is left out: TRL's trainer trains it.
    """
    base = ["lora=all_linear", "lora.dropout=0.05"]

    def tokens(n: int) -> Case:
        return f"tokens {n}", [*ALL_LINEAR, *packed(n)]

    def rank(r: int) -> Case:
        return f"rank {r}", [*base, f"lora.r={r}", "quant=nf4", *packed(SWEPT_TOKENS)]

    def quant(q: str) -> Case:
        return f"quant {q}", [*base, "lora.r=16", f"quant={q}", *packed(SWEPT_TOKENS)]

    ends = [tokens(SWEPT_TOKENS), tokens(256), tokens(16384), rank(8), rank(256), quant("none"), quant("fp4")]
    return [*ends, *map(tokens, (1024, 8192, 512, 4096)), *map(rank, (64, 128, 32))]


def chat_length(draw: random.Random, longest: int) -> int:
    """Tokens of a row, spread as those of chats: log-normal, about 290."""
    return int(min(longest, max(16, draw.lognormvariate(math.log(350) - 0.32, 0.8))))


PEERS: list[tuple[str, str, list[str]]] = [
    ("256", "trl", ["gc=0", "targets=all", "r=16", "dropout=0.05", "bs=1"]),
    ("1024", "trl", ["gc=0", "targets=all", "r=16", "dropout=0.05", "bs=4"]),
    ("2048", "trl", ["gc=0", "targets=all", "r=16", "dropout=0.05", "bs=8"]),
    ("8192", "trl", ["gc=1", "targets=all", "r=16", "dropout=0.05", "bs=8", "packing=1", "liger=1"]),
    ("256", "unsloth", ["gc=1", "targets=all", "r=16", "dropout=0", "bs=1"]),
    ("1024", "unsloth", ["gc=0", "targets=all", "r=16", "dropout=0", "bs=4"]),
    ("2048", "unsloth", ["gc=0", "targets=all", "r=16", "dropout=0", "bs=8"]),
    ("8192", "unsloth", ["gc=1", "targets=all", "r=16", "dropout=0", "bs=28"]),
]
"""Unsloth at the settings that are its fastest there; its fast kernels need dropout 0."""
