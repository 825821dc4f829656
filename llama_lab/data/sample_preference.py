"""The embedded data set `sample_preference`: a request in plain English, the right command, and a wrong one beside it.

The requests and right commands are those of `sample`. The wrong command is one that somebody in a hurry would type: it
composes a run, and does something else than was asked.
Write the two files again: python -m llama_lab.data.sample_preference
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from llama_lab.data.sample import ALWAYS, COMMAND, SEED, SETTINGS, Deck, build, to_jsonl
from llama_lab.paths import CONF_DIR

Words = dict[str, str]
"""A command's settings by their keys, in their order."""


DEFAULTS = {"quant": "nf4", "lora.r": "16"}
"""What a run has where the command does not say it: leaving such a word out, or adding it, would be no mistake."""


def _other_value(words: Words, rng: Random) -> Words | None:
    """One setting has another value than was asked for."""
    key = rng.choice(list(words))
    return words | {key: rng.choice([value for value in SETTINGS[key].values if value != words[key]])}


def _left_out(words: Words, rng: Random) -> Words | None:
    """A setting that was asked for is not there; None where that changes nothing."""
    more = [key for key, value in words.items() if key not in ALWAYS and DEFAULTS[key] != value]
    gone = rng.choice(more) if more else None
    return {key: value for key, value in words.items() if key != gone} if gone else None


def _added(words: Words, rng: Random) -> Words | None:
    """A setting that nobody asked for; None where all are there."""
    more = [key for key in SETTINGS if key not in words]
    if not more:
        return None
    new = rng.choice(more)
    all_words = words | {new: rng.choice([value for value in SETTINGS[new].values if value != DEFAULTS[new]])}
    return {key: all_words[key] for key in SETTINGS if key in all_words}


MISTAKES: tuple[Callable[[Words, Random], Words | None], ...] = (_other_value, _other_value, _left_out, _added)
"""Every second mistake is another value."""


def wrong_command(command: str, deck: Deck[int], rng: Random) -> str:
    """A command that does something else than `command`."""
    words = dict(word.split("=", 1) for word in command.removeprefix(COMMAND).split())
    made = {i: mistake(words, rng) for i, mistake in enumerate(MISTAKES)}
    wrong = made[deck.deal(lambda i: made[i] is not None)]
    assert wrong is not None
    return " ".join([COMMAND, *(f"{key}={value}" for key, value in wrong.items())])


def build_pairs(conf_dir: Path = CONF_DIR) -> dict[str, list[dict[str, str]]]:
    """All rows of both splits, `train` and `valid`; the same at every call.

    Raises:
        ConfigError: see sample.check_words.
    """
    pairs = {}
    for split, rows in build(conf_dir).items():
        rng = Random(f"{SEED} mistakes {split}")
        deck = Deck(rng, range(len(MISTAKES)))
        pairs[split] = [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": wrong_command(row["completion"], deck, rng),
            }
            for row in rows
        ]
    return pairs


def path_of(split: str) -> Path:
    """The shipped file of a split."""
    return Path(__file__).with_name(f"sample_preference_{split}.jsonl")


if __name__ == "__main__":
    for split, rows in build_pairs().items():
        path_of(split).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        print(f"{path_of(split)}: {len(rows)} rows")
