"""The verbs that take a result away: their arguments and help, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.take.options import (
    MAX_PORT,
    MERGE_FILE,
    MODELFILE,
    EvaluateOptions,
    GgufKind,
    MergeOptions,
    Onto,
    OutDtype,
    Server,
)

if TYPE_CHECKING:
    from llama_lab.take.source import Source

EXAMPLE = "example:\n  python -m llama_lab"
SOURCE = "the folder of a run, of a checkpoint of it, or of a plain PEFT adapter"
SETTINGS = "where base and rows are found, such as model.name=FOLDER dataset=sample"
RUN = "outputs/2026-01-31/12-00-00"
Word = TypeVar("Word", bound=str)


def merge(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `merge`."""
    parser.description = (
        "Put the adapter into the weights. The merged model is compared with the adapter on the base that it was "
        "trained on, over held-out rows; the base that keeps the answers is chosen, and a merge that changes them is "
        "refused."
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


def export(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `export`."""
    parser.description = (
        "Merge, verified as by the verb merge, and write a GGUF with an Ollama Modelfile; or print the command that "
        "serves the adapter with vLLM."
    )
    parser.epilog = f"{EXAMPLE} export {RUN} --gguf my.gguf\n  python -m llama_lab export {RUN} --vllm"
    source_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gguf", type=Path, metavar="FILE", help="a new file; its Modelfile lies beside it")
    what.add_argument("--vllm", action="store_true", help="print the command that serves the adapter on its base")
    parser.add_argument(
        "--type", type=one_of(list(GgufKind)), choices=list(GgufKind), default=GgufKind.f16, help="default: f16"
    )
    merge_arguments(parser, with_dtype=False)
    args = parser.parse_intermixed_args(words)
    path = Path(args.run)
    if args.vllm:
        import shlex

        from llama_lab.take.serving import command_of

        print(shlex.join(command_of(Server.vllm, path, args.settings, 8000)))
        return 0
    from llama_lab.take.gguf_file import check_converter
    from llama_lab.take.target import check_new_file

    if args.gguf.suffix != ".gguf":  # by which servers know it, and beside which its Modelfile has a name of its own
        named = args.gguf.parent / f"{args.gguf.name or 'my'}.gguf"
        raise ConfigError(f"--gguf {args.gguf}: the name ends in .gguf. Type --gguf {named}")
    check_new_file(args.gguf, "--gguf")
    check_new_file(args.gguf.with_suffix(MODELFILE), "--gguf: its Modelfile")
    check_converter()
    if (path / MERGE_FILE).is_file():
        from llama_lab.take.export import export_merged

        return export_merged(path, args.gguf, args.type)
    source = opened(path, args.settings, measures=True)
    from llama_lab.take.export import export_run

    return export_run(source, args.gguf, args.type, merge_options(args))


def serve(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `serve`."""
    parser.description = (
        "Serve a merged folder, a GGUF or, with --with vllm, a run on this machine's loopback address with OpenAI's "
        "protocol, by a server of transformers, vLLM or llama-cpp-python. Ctrl-C ends it."
    )
    parser.epilog = (
        f"{EXAMPLE} serve my_model\n  python -m llama_lab serve {RUN} --with vllm\n"
        "  python -m llama_lab serve my.gguf --port 8080"
    )
    source_arguments(parser)
    parser.add_argument(
        "--with",
        dest="server",
        type=one_of(list(Server)),
        choices=list(Server),
        help="default: llama-cpp for a GGUF, else transformers, which takes no adapters",
    )
    parser.add_argument("--port", type=port, default=8000, help="default: 8000")
    parser.add_argument("--dry-run", action="store_true", help="only print the command")
    args = parser.parse_intermixed_args(words)
    from llama_lab.take.serving import ServeOptions, serve

    options = ServeOptions(server=args.server, port=args.port, dry_run=args.dry_run)
    return serve(Path(args.run), args.settings, options)


def push(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `push`."""
    parser.description = (
        "Show what would go to the hub: an adapter, or the folder that merge made, with a model card. --send sends it."
    )
    parser.epilog = f"{EXAMPLE} push {RUN} --repo me/llama-2-7b-guanaco"
    source_arguments(parser)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made where it is not there")
    parser.add_argument("--send", action="store_true", help="send it (default: only show it)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_intermixed_args(words)
    from llama_lab.take.push import PushOptions, push

    return push(Path(args.run), args.settings, PushOptions(repository=args.repo, send=args.send, private=args.private))


def repro(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """The verb `repro`."""
    parser.description = (
        "Do a run again from its run.json. Says what is not as it was (code, packages, data, hardware), runs it into a "
        "new folder, and compares curve, result and adapter: bit by bit where all is as it was, else within a "
        "tolerance. Exit code: 0 equal, 1 not."
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


def merge_arguments(parser: argparse.ArgumentParser, *, with_dtype: bool = True) -> None:
    """What decides about a merge."""
    if with_dtype:
        parser.add_argument(
            "--dtype", type=one_of(list(OutDtype)), choices=list(OutDtype), default=OutDtype.bf16, help="default: bf16"
        )
    parser.set_defaults(dtype=OutDtype.bf16)
    parser.add_argument(
        "--onto", type=one_of(list(Onto)), choices=list(Onto), help="weights to add to (default: the more faithful)"
    )
    parser.add_argument(
        "--max-kl",
        type=positive,
        default=0.01,
        metavar="NATS",
        help="refuse a merge further off (default: 0.01)",
    )
    parser.add_argument("--rows", type=at_least_one, default=32, help="held-out rows to compare (default: 32)")
    parser.add_argument("--force", action="store_true", help="write an unfaithful merge, and say so in its card")


def merge_options(args: argparse.Namespace) -> MergeOptions:
    """The words as options."""
    return MergeOptions(dtype=args.dtype, onto=args.onto, max_kl=args.max_kl, num_rows=args.rows, force=args.force)


def one_of(choices: Collection[Word]) -> Callable[[str], Word]:
    """What reads one of these words; argparse's own check names neither the nearest nor, of an enum, any."""

    def read(word: str) -> Word:
        if word not in choices:
            raise argparse.ArgumentTypeError(
                f"{word} is no choice.{did_you_mean(word, choices)} There are {', '.join(choices)}"
            )
        return next(choice for choice in choices if choice == word)

    return read


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


def port(word: str) -> int:
    """A port of this machine.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not (word.isdecimal() and 1 <= int(word) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{word} is no whole number from 1 to {MAX_PORT}")
    return int(word)
