"""The embedded data set `sample`: a request in plain English and the llama_lab command that does it.

The rows come from the words below and from the config tree: every choice of conf/ has words here, or is named in
LEFT_OUT, else nothing is built. The held-out rows say the same values in sentences that no training row has.
Write the two files again: python -m llama_lab.data.sample
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Generic, TypeVar

from llama_lab.errors import ConfigError
from llama_lab.paths import CONF_DIR

T = TypeVar("T")

SEED = 0
NUM_ROWS = {"train": 720, "valid": 48}
COMMAND = "python -m llama_lab"

LEFT_OUT = (
    ("model", "tiny"),  # random weights, for the project's own tests: nobody fine-tunes it
    ("dataset", "jsonl"),  # needs dataset.path as well
    ("dataset", "codellama_generations"),  # needs dataset.columns as well
    ("dataset", "sample_preference"),  # needs a preference trainer as well
    ("dataset", "sample_rewards"),  # for trainers that score answers
    ("dataset", "hh_rlhf"),  # needs a preference trainer as well
    ("dataset", "ultrafeedback_binarized"),  # needs a preference trainer as well
    ("dataset", "sharegpt"),  # needs a pip package that has no licence
)


@dataclass(frozen=True)
class Setting:
    """How people say one word of the command."""

    values: Mapping[str, tuple[str, ...]]
    """What stands right of the `=`, and the words for it. A word that starts with `with` takes no form."""
    forms: tuple[str, ...] = ()
    """How a row puts the word into a sentence; the first without its preposition serves in lists."""

    @property
    def short(self) -> str:
        """The form in a list, such as `Llama 2 7B: nf4, rank 8`."""
        return self.forms[0].partition(" ")[2]


def _numbers(text: str) -> Mapping[str, tuple[str, ...]]:
    """Numbers are copied from the request as they are."""
    return {number: (number,) for number in text.split()}


MODELS = {
    "llama2_7b": ("Llama 2 7B", "Llama-2-7b"),
    "llama2_7b_chat": ("Llama 2 7B Chat", "Llama-2-7b-chat"),
    "llama2_13b": ("Llama 2 13B", "Llama-2-13b"),
    "llama2_13b_chat": ("Llama 2 13B Chat", "Llama-2-13b-chat"),
    "llama2_70b": ("Llama 2 70B", "Llama-2-70b"),
    "llama2_70b_chat": ("Llama 2 70B Chat", "Llama-2-70b-chat"),
    "codellama_7b": ("Code Llama 7B", "CodeLlama-7b"),
    "codellama_7b_instruct": ("Code Llama 7B Instruct", "CodeLlama-7b-instruct"),
    "smollm2_135m": ("SmolLM2 135M", "SmolLM2-135m"),
}
DATASETS = {
    "sample": ("the sample data", "the sample set"),
    "guanaco": ("the full guanaco", "all of guanaco"),
    "guanaco_1k": ("guanaco 1k", "the 1k guanaco"),
    "english_quotes": ("English quotes", "the quotes data"),
    "codellama_2_20k": ("the 20k code set", "the 20k code rows"),
}
QUANTS = {
    "nf4": ("NF4", "4-bit NormalFloat"),
    "fp4": ("FP4", "4-bit float"),
    "int8": ("INT8", "8-bit"),
    "none": ("without quantization", "with no quantization"),
}
# In the order in which every command names them, whatever the order of the request.
SETTINGS = {
    "model": Setting(MODELS),
    "dataset": Setting(DATASETS, ("on {}", "using {}")),
    "quant": Setting(QUANTS, ("in {}", "with {} weights", "quantized to {}")),
    "lora.r": Setting(_numbers("4 8 16 32 64 128"), ("with rank {}", "at rank {}", "with r={}")),
}
ALWAYS = ("model", "dataset")
"""What every request names."""

# {model} a model's word, {settings} forms joined to a sentence, {list} the short words joined by commas.
FRAMES = {
    "train": (
        "fine-tune {model} {settings}.",
        "train {model} {settings}.",
        "tune {model} {settings}",
        "please tune {model} {settings}.",
        "can you train {model} {settings}?",
        "I want to fine-tune {model} {settings}.",
        "let's train {model} {settings}.",
        "run {model} {settings}",
        "a fine-tune of {model} {settings}, please",
        "{settings}, train {model}.",
        "{model}: {list}",
        "{model}, {list}",
    ),
    "valid": (
        "could you adapt {model} {settings}?",
        "start a training of {model} {settings}.",
        "I'd like {model} tuned {settings}.",
        "we need {model} trained {settings}.",
        "kindly fine-tune {model} {settings}.",
        "now tune {model} {settings}",
        "{settings}, adapt {model}, please.",
        "new job: {model}, {list}",
    ),
}
# What stands between the forms of a sentence, and before the last of them.
JOINS = ((" ", " "), (" ", " and "), (", ", ", "))

# How many settings a row has beside model and data. Mostly few: the rows are short, since two cores learn them in a
# minute.
NUM_MORE = (*[0] * 6, *[1] * 7, *[2] * 3)
IN_LOWER_CASE = (*[False] * 3, True)


def check_words(conf_dir: Path) -> None:
    """Compare the words above with the choices of the config tree.

    Raises:
        ConfigError: a choice has no words, or there are words for a choice that is gone.
    """
    for group in ("model", "dataset", "quant"):
        choices = {path.stem for path in (conf_dir / group).glob("*.yaml")}
        words = set(SETTINGS[group].values) | {choice for of, choice in LEFT_OUT if of == group}
        if new := sorted(choices - words):
            raise ConfigError(
                f"{group}={new[0]} of {conf_dir} has no words in llama_lab/data/sample.py. "
                f"Add some to SETTINGS, or add ({group!r}, {new[0]!r}) to LEFT_OUT with the reason."
            )
        if gone := sorted(words - choices):
            raise ConfigError(
                f"llama_lab/data/sample.py has words for {group}={gone[0]}, which {conf_dir} does not hold. "
                "Take it out of SETTINGS or LEFT_OUT, then run python -m llama_lab.data.sample."
            )


class Deck(Generic[T]):
    """Cards dealt in random order, each once before any comes again.

    So the first 264 training rows, all that the default run reads (conf/dataset/sample.yaml), use all words evenly.
    """

    def __init__(self, rng: Random, cards: Iterable[T]) -> None:
        self._rng = rng
        self._cards = list(cards)
        self._left: list[T] = []

    def deal(self, fits: Callable[[T], bool] = lambda card: True) -> T:
        """The next card that fits; the ones passed over stay next. One card at least must fit."""
        if not any(map(fits, self._left)):
            self._left += self._rng.sample(self._cards, len(self._cards))
        card = next(filter(fits, self._left))
        self._left.remove(card)
        return card


class Writer:
    """Writes the rows of one split, `train` or `valid`."""

    def __init__(self, split: str, rng: Random) -> None:
        self._rng = rng
        self._num_more = Deck(rng, NUM_MORE)
        self._keys = Deck(rng, [key for key in SETTINGS if key not in ALWAYS])
        self._values = {key: Deck(rng, setting.values) for key, setting in SETTINGS.items()}
        self._words = {(k, v): Deck(rng, words) for k, s in SETTINGS.items() for v, words in s.values.items()}
        self._forms = {k: Deck(rng, s.forms) for k, s in SETTINGS.items()}
        self._frames, self._joins = Deck(rng, FRAMES[split]), Deck(rng, JOINS)
        self._lower_case = Deck(rng, IN_LOWER_CASE)

    def row(self) -> dict[str, str]:
        """One request as `prompt`, its command as `completion`."""
        chosen = self._choose()
        command = [COMMAND, *(f"{key}={chosen[key]}" for key in SETTINGS if key in chosen)]
        return {"prompt": self._request(chosen), "completion": " ".join(command)}

    def _choose(self) -> dict[str, str]:
        """What is asked for: a model, then the settings in the order in which the request says them."""
        keys = [key for key in ALWAYS if key != "model"]
        for _ in range(self._num_more.deal()):
            keys.append(self._keys.deal(lambda key: key not in keys))
        self._rng.shuffle(keys)
        return {key: self._values[key].deal() for key in ("model", *keys)}

    def _request(self, chosen: dict[str, str]) -> str:
        words = {key: self._words[key, value].deal() for key, value in chosen.items()}
        model = words.pop("model")
        keys = list(words)
        frame = self._frames.deal()
        if "{list}" in frame:
            said = ", ".join(_put(SETTINGS[key].short, words[key]) for key in keys)
        else:
            said = _join([_put(self._forms[key].deal(), words[key]) for key in keys], *self._joins.deal())
        text = frame.format(model=model, settings=said, list=said)
        return text.lower() if self._lower_case.deal() else text[0].upper() + text[1:]


def _put(form: str, word: str) -> str:
    return word if word.startswith("with") else form.format(word)


def _join(parts: list[str], between: str, before_last: str) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return between.join(parts[:-1]) + before_last + parts[-1]


def build(conf_dir: Path = CONF_DIR) -> dict[str, list[dict[str, str]]]:
    """All rows of both splits, `train` and `valid`; the same at every call.

    Args:
        conf_dir: the config tree whose choices must all have words.

    Raises:
        ConfigError: see check_words.
    """
    check_words(conf_dir)
    rows: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for split, num_rows in NUM_ROWS.items():
        writer = Writer(split, Random(f"{SEED} {split}"))
        rows[split] = []
        while len(rows[split]) < num_rows:
            row = writer.row()
            if row["prompt"].lower() not in seen:
                seen.add(row["prompt"].lower())
                rows[split].append(row)
    return rows


def path_of(split: str) -> Path:
    """The shipped file of a split."""
    return Path(__file__).with_name(f"sample_{split}.jsonl")


def to_jsonl(rows: list[dict[str, str]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    for split, rows in build().items():
        path_of(split).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        print(f"{path_of(split)}: {len(rows)} rows")
