"""The verbs: their arguments and help, nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from llama_lab.errors import ConfigError, did_you_mean, nearest


def run_verb(words: list[str]) -> int:
    """Do what the first word says; the exit code.

    Raises:
        ConfigError: it is no verb; names the nearest one, or the setting that was meant.
    """
    verb, *rest = words
    if verb not in VERBS:
        raise unknown_verb(verb)
    parser = argparse.ArgumentParser(
        prog=f"python -m llama_lab {verb}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return VERBS[verb](parser, rest)


def unknown_verb(word: str) -> ConfigError:
    """The error for a first word that is neither a verb nor KEY=VALUE."""
    from llama_lab.explain import known_keys

    if word in known_keys() or "." in word:
        return ConfigError(f"'{word}' has no value. Settings are typed KEY=VALUE, such as {word}=...")
    hint = did_you_mean(word, VERBS) if nearest(word, VERBS) else ""
    return ConfigError(
        f"'{word}' is no verb.{hint} Verbs: {', '.join(VERBS)}. Settings are typed KEY=VALUE; see --help."
    )


def _generate(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Answer one request with a trained run."
    parser.epilog = 'example:\n  python -m llama_lab generate outputs/2026-01-31/12-00-00 "fine-tune Llama 2 in fp4"'
    _run_argument(parser)
    parser.add_argument("request", metavar="REQUEST", help="what to ask")
    _answer_arguments(parser)
    args = parser.parse_args(words)
    if not args.request.strip():
        raise ConfigError("The request is empty. Type it in quotes after the run's folder.")
    from llama_lab.talk import generate

    generate(args.run, args.request, _settings(args), seed=args.seed)
    return 0


def _chat(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Talk with a trained run: /reset forgets, /system TEXT sets a system prompt, /exit ends."
    parser.epilog = "example:\n  python -m llama_lab chat outputs/2026-01-31/12-00-00"
    _run_argument(parser)
    parser.add_argument("--system", help="system prompt")
    _answer_arguments(parser)
    args = parser.parse_args(words)
    from llama_lab.talk import chat

    chat(args.run, _settings(args), system=args.system, seed=args.seed)
    return 0


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, such as outputs/DATE/TIME")


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="longest answer in tokens (default: the run's own)")
    parser.add_argument("--sample", action="store_true", help="draw the answer instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, help="of --sample (default: the run's own)")
    parser.add_argument("--top-p", type=float, help="of --sample (default: the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """What the words change of the run's own generation settings."""
    given = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    changed: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if args.sample:
        changed["do_sample"] = True
    return changed


VERBS: dict[str, Callable[[argparse.ArgumentParser, list[str]], int]] = {"generate": _generate, "chat": _chat}
