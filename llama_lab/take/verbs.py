"""The verbs that take a result away: their arguments and help, nothing else."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.errors import ConfigError
from llama_lab.take.options import EvaluateOptions, MergeOptions, Onto, OutDtype

if TYPE_CHECKING:
    from llama_lab.take.source import Source

EXAMPLE = "example:\n  python -m llama_lab"
SOURCE = "the folder of a run, of a checkpoint of it, or of a plain PEFT adapter"
SETTINGS = "where base and rows are found, such as model.name=FOLDER dataset=sample"
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
    source = opened(args.run, args.settings, measures=True)
    from llama_lab.take.merge import merge

    return merge(source, args.to, merge_options(args))


def evaluate(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `evaluate`."""
    parser.description = (
        "Measure runs on held-out rows: loss, perplexity, the data set's own metrics; for preferences accuracy and "
        "margin. Writes evaluation.json into each folder, and the numbers to its W&B run."
    )
    parser.epilog = (
        f"{EXAMPLE} evaluate {RUN} --base\n"
        f"  python -m llama_lab evaluate {RUN} --tasks hellaswag,my_task.yaml --limit 100"
    )
    parser.add_argument("words", metavar="RUN|KEY=VALUE", nargs="+", help=f"{SOURCE}; and {SETTINGS}")
    parser.add_argument("--base", action="store_true", help="measure the base model as well, and show the difference")
    parser.add_argument("--tasks", default="", metavar="TASK,...", help="of lm-eval: names, or YAML files of your own")
    parser.add_argument("--limit", type=at_least_one, help="rows of each task (default: all)")
    parser.add_argument("--chat-template", action="store_true", help="ask the tasks through the chat template")
    args = parser.parse_intermixed_args(words)
    from llama_lab.take.tasks import check_tasks

    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    check_tasks(tasks)
    settings = [word for word in args.words if "=" in word and not Path(word).is_dir()]
    sources = [opened(word, settings, measures=True) for word in args.words if word not in settings]
    if not sources:
        raise ConfigError("evaluate needs the folder of a run. Type: python -m llama_lab evaluate RUN")
    from llama_lab.take.measure import evaluate

    return evaluate(
        sources, EvaluateOptions(base=args.base, tasks=tasks, limit=args.limit, chat_template=args.chat_template)
    )


def push(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `push`."""
    parser.description = (
        "Show what would go to the hub: an adapter, or the folder that merge made, with a model card. --send sends it."
    )
    parser.epilog = f"{EXAMPLE} push {RUN} --repo me/llama-2-7b-guanaco"
    source_arguments(parser)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository; made where it is not there")
    parser.add_argument("--send", action="store_true", help="send it (default: only show it)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_intermixed_args(words)
    from llama_lab.take.push import PushOptions, push

    return push(Path(args.run), args.settings, PushOptions(repository=args.repo, send=args.send, private=args.private))


def repro(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `repro`."""
    parser.description = (
        "Do a run again from its run.json. Says what is not as it was (code, packages, data, hardware), runs it into a new "
        "folder, and compares curve, result and adapter: bit by bit where all is as it was, else within a tolerance. "
        "Exit code: 0 equal, 1 not."
    )
    parser.epilog = f"{EXAMPLE} repro {RUN}"
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, or its run.json")
    parser.add_argument("--to", type=Path, metavar="DIR", help="the new folder (default: beside the run's)")
    parser.add_argument("--check", action="store_true", help="only say what is not as it was")
    parser.add_argument("--patch", action="store_true", help="only print the uncommitted change of its code")
    parser.add_argument(
        "--tolerance", type=positive, default=0.02, help="relative, where the hardware is another (default: 0.02)"
    )
    args = parser.parse_args(words)
    from llama_lab.take.repro import ReproOptions, repro

    options = ReproOptions(to=args.to, check=args.check, patch=args.patch, tolerance=args.tolerance)
    return repro(args.run, options)


def source_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and KEY=VALUE."""
    parser.add_argument("run", metavar="RUN", help=SOURCE)
    parser.add_argument(
        "settings",
        metavar="KEY=VALUE",
        nargs="*",
        help=SETTINGS,
    )


def opened(run: str | Path, settings: list[str], *, measures: bool = False) -> Source:
    """The source, checked; its notes are told, and the libraries are ready to be imported.

    Args:
        measures: the verb needs held-out rows.
    """
    from llama_lab.take.load import prepare_verb
    from llama_lab.take.source import open_source

    source = open_source(Path(run), settings)
    rows = "Measured on the rows that come with llama_lab. Your own: dataset=jsonl dataset.path=FILE"
    for note in [*source.notes, *([rows] if measures and source.assumes_rows else [])]:
        print(f"Note: {note}.", file=sys.stderr)
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

