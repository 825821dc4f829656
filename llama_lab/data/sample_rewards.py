"""The embedded data set `sample_rewards`: requests in plain English whose answer can be checked.

Its training rows are written as those of `sample` are, from the words and the config tree, but none asks what a row of
`sample` asks: a model that has learned `sample` has not seen them. The held-out rows are those of `sample`.
Write the two files again: python -m llama_lab.data.sample_rewards
"""

from pathlib import Path
from random import Random

from llama_lab.data.sample import NUM_ROWS, SEED, Writer, build, to_jsonl
from llama_lab.paths import CONF_DIR


def build_prompts(conf_dir: Path = CONF_DIR) -> dict[str, list[dict[str, str]]]:
    """All rows of both splits, `train` and `valid`, as `prompt` and `answer`; the same at every call.

    Raises:
        ConfigError: see sample.check_words.
    """
    known = build(conf_dir)
    seen = {row["prompt"].lower() for rows in known.values() for row in rows}
    writer = Writer("train", Random(f"{SEED} rewards"))
    train: list[dict[str, str]] = []
    while len(train) < NUM_ROWS["train"]:
        row = writer.row()
        if row["prompt"].lower() not in seen:
            seen.add(row["prompt"].lower())
            train.append(row)
    splits = {"train": train, "valid": known["valid"]}
    return {
        split: [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows]
        for split, rows in splits.items()
    }


def path_of(split: str) -> Path:
    """The shipped file of a split."""
    return Path(__file__).with_name(f"sample_rewards_{split}.jsonl")


if __name__ == "__main__":
    for split, rows in build_prompts().items():
        path_of(split).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        print(f"{path_of(split)}: {len(rows)} rows")
