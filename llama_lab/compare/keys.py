"""The words of --where, --columns and --sort: what a run can be asked for, and the nearest one to what was typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_lab.compare.read import GROUP_KEYS, NUMBERS, Run
from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.lock import below

FACTS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.name,
    "name": lambda run: run.title,
    "status": lambda run: run.status,
    "note": lambda run: run.note,
    "folder": lambda run: str(run.folder),
    "created": lambda run: run.lock.get("created"),
    "commit": lambda run: below(run.lock, "code", "commit"),
    "data": lambda run: below(run.lock, "dataset", "fingerprint"),
    "gpu": lambda run: (
        ", ".join(map(str, gpus)) if isinstance(gpus := below(run.lock, "hardware", "gpus"), list) else gpus
    ),
}
"""What a run knows of itself beside its settings and numbers."""
GROUPS = (*GROUP_KEYS, "lora", "experiment", "search")
OTHER_WORDS = {
    "loss": "eval_loss",
    "time": "train_runtime_s",
    "speed": "tokens_per_s",
    "memory": "peak_memory_gib",
    "params": "num_trainable_params",
    "steps": "num_steps",
}


def resolve(word: str, runs: Sequence[Run], option: str) -> str:
    """The key that a word means: itself, another tool's word for it, or the one setting with that last name.

    Raises:
        ConfigError: no run knows it; names the nearest.
    """
    from llama_lab.known_keys import ALIASES, known_keys

    settings = {key for run in runs for key in run.settings} | set(known_keys()) - set(GROUPS)
    known = [*FACTS, *NUMBERS, *GROUPS, *sorted(settings)]
    if word in known:
        return word
    for other in (OTHER_WORDS.get(word), ALIASES.get(word)):
        if other in known:
            return str(other)
    same_leaf = [key for key in settings if key.rpartition(".")[2] == word]
    if len(same_leaf) == 1:
        return same_leaf[0]
    if same_leaf:
        raise ConfigError(
            f"{option}: {word} is the name of several settings. Type one of: {', '.join(sorted(same_leaf))}."
        )
    leaves = {key.rpartition(".")[2]: key for key in settings}
    hint = did_you_mean(word, known) or did_you_mean(word, leaves)
    raise ConfigError(
        f"{option}: {word} is neither a setting nor a number of a run.{hint} "
        f"Numbers: {', '.join(NUMBERS)}. Settings: python -m llama_lab --cfg job"
    )


def getter(key: str) -> Callable[[Run], Any]:
    """The function that reads a resolved key from a run."""
    if key in FACTS:
        return FACTS[key]
    if key in NUMBERS:
        return lambda run: run.numbers.get(key)
    if key in GROUPS:
        return lambda run: run.choices.get(key)
    return lambda run: run.settings.get(key)
