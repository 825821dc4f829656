"""The verbs that take a result away: their arguments and help, nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.errors import ConfigError
from llama_lab.take.options import MergeOptions, Onto, OutDtype

if TYPE_CHECKING:
    from llama_lab.take.source import Source

EXAMPLE = "example:\n  python -m llama_lab"
RUN = "outputs/2026-01-31/12-00-00"


def merge(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `merge`."""
    parser.description = (
        "Put the adapter into the weights. The merged model is compared with the adapter on the base that it was trained "
        "on, over held-out rows; the base that keeps the answers is chosen, and a merge that changes them is refused."
    )
    parser.epilog = f"{EXAMPLE} merge {RUN} --to my_model"
    source_arguments(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder for the merged model")
    merge_arguments(parser)
    args = parser.parse_intermixed_args(words)
    from llama_lab.take.target import check_target

    check_target(args.to)
    source = opened(args.run, args.settings)
    from llama_lab.take.merge import merge

    return merge(source, args.to, merge_options(args))


def source_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """RUN and KEY=VALUE."""
    told = "the folder of a run, of a checkpoint of it, or of a plain PEFT adapter"
    parser.add_argument("run", metavar="RUN", nargs="+" if several else None, help=told)
    parser.add_argument(
        "settings",
        metavar="KEY=VALUE",
        nargs="*",
        help="where base and rows are found, such as model.name=FOLDER dataset=sample",
    )


def opened(run: str | Path, settings: list[str]) -> Source:
    """The source, checked; its notes are told, and the libraries are ready to be imported."""
    from llama_lab.take.load import prepare_verb
    from llama_lab.take.source import open_source

    source = open_source(Path(run), settings)
    for note in source.notes:
        print(f"Note: {note}.")
    prepare_verb(source.config)
    return source


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides about a merge."""
    parser.add_argument("--dtype", type=OutDtype, choices=list(OutDtype), default=OutDtype.bf16, help="default: bf16")
    parser.add_argument("--onto", type=Onto, choices=list(Onto), help="the weights to add to (default: the more faithful)")
    parser.add_argument(
        "--max-kl", type=positive, default=0.01, metavar="NATS", help="refuse a merge that is further off (default: 0.01)"
    )
    parser.add_argument("--rows", type=at_least_one, default=32, help="held-out rows to compare (default: 32)")
    parser.add_argument("--force", action="store_true", help="write a merge that is not faithful, and say so in its card")


def merge_options(args: argparse.Namespace) -> MergeOptions:
    """The words as options."""
    return MergeOptions(
        dtype=args.dtype, onto=args.onto, max_kl=args.max_kl, num_rows=args.rows, force=args.force
    )


def positive(word: str) -> float:
    """A positive number.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no positive number")
    return number


def at_least_one(word: str) -> int:
    """A whole number from 1.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not (word.isdecimal() and int(word)):
        raise argparse.ArgumentTypeError(f"{word} is no whole number from 1")
    return int(word)


def no_empty(text: str, what: str) -> str:
    """The text.

    Raises:
        ConfigError: there is nothing in it.
    """
    if not text.strip():
        raise ConfigError(f"The {what} is empty. Type it in quotes.")
    return text
