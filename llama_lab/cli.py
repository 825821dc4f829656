"""The verbs: their arguments and help, nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.take import verbs as take

if TYPE_CHECKING:
    from llama_lab.plan import Options


class WordParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is told as every other wrong word is: one message, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage.

        Raises:
            ConfigError: always.
        """
        before, _, unknown = message.partition("unrecognized arguments: ")
        reason = f"{message}." if before else self._unknown(unknown.split(" ")[0])
        raise ConfigError(f"{reason} See: {self.prog} --help")

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"'{word}' is one word too many; a text of several words is typed in quotes."
        if "=" in word:
            return f"{word} is no flag; settings are typed without dashes: {word.lstrip('-')}."
        hint = did_you_mean(word, [name for name in self._option_string_actions if name.startswith("--")])
        return f"{word} is no flag here.{hint}"


def run_verb(words: list[str]) -> int:
    """Do what the first word says; the exit code.

    Raises:
        ConfigError: it is no verb; names the nearest one, or the setting that was meant. Or its arguments are wrong.
    """
    verb, *rest = words
    verb = ALIASES.get(verb, verb)
    if verb not in VERBS:
        raise unknown_verb(verb)
    parser = WordParser(
        prog=f"python -m llama_lab {verb}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return VERBS[verb](parser, rest)


def unknown_verb(word: str) -> ConfigError:
    """The error for a first word that is neither a verb nor KEY=VALUE."""
    from llama_lab.explain import no_value
    from llama_lab.known_keys import known_keys

    if not word.strip():
        return ConfigError("A word of the command line is empty. Settings are typed KEY=VALUE; see --help.")
    if word in known_keys() or ":" in word:
        return no_value(word)
    if Path(word).is_dir():
        return ConfigError(f"{word} is a folder. Type: python -m llama_lab generate {word} REQUEST, or resume={word}")
    hint = did_you_mean(word, VERBS)
    if "." in word and not hint:
        return no_value(word)
    return ConfigError(
        f"'{word}' is no verb.{hint} Verbs: {', '.join(VERBS)}. Settings are typed KEY=VALUE; see --help."
    )


def _generate(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Answer one request with a trained run, or each prompt of a file as a line of JSON."
    parser.epilog = (
        'example:\n  python -m llama_lab generate outputs/2026-01-31/12-00-00 "fine-tune Llama 2 in fp4"\n'
        "  python -m llama_lab generate outputs/2026-01-31/12-00-00 --file prompts.jsonl --base"
    )
    parser.add_argument("run", metavar="RUN", help=take.SOURCE)
    parser.add_argument("request", metavar="REQUEST", nargs="?", help="what to ask")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help=take.SETTINGS)
    parser.add_argument("--file", type=Path, metavar="JSONL", help='a file with a {"prompt": "a request"} a line')
    _answer_arguments(parser)
    args = parser.parse_intermixed_args(words)
    if args.file is not None and args.request is not None:
        args.settings, args.request = [args.request, *args.settings], None
    if args.file is None and not (args.request or "").strip():
        raise ConfigError("The request is empty. Type it in quotes after the run's folder, or --file prompts.jsonl.")
    from llama_lab.talk import answer_rows, generate, read_prompts

    if args.file is not None:
        rows = read_prompts(args.file)  # before the model is loaded, and once: it may be a pipe
        source = take.opened(args.run, args.settings)
        answer_rows(source, rows, _settings(args), seed=args.seed, base=args.base)
    else:
        source = take.opened(args.run, args.settings)
        generate(source, args.request, _settings(args), seed=args.seed, base=args.base)
    return 0


def _chat(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Talk with a trained run: /reset forgets, /system TEXT sets a system prompt, /exit ends."
    parser.epilog = "example:\n  python -m llama_lab chat outputs/2026-01-31/12-00-00 --base"
    take.source_arguments(parser)
    parser.add_argument("--system", help="system prompt")
    _answer_arguments(parser)
    args = parser.parse_intermixed_args(words)
    source = take.opened(args.run, args.settings)
    from llama_lab.talk import chat

    chat(source, _settings(args), system=args.system, seed=args.seed, base=args.base)
    return 0


def _plan(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = (
        "Say what a run would train on and what it would cost, on the CPU and without the weights. "
        "Exit code: 0 fine, 1 warnings, 2 the run would fail."
    )
    parser.epilog = "example:\n  python -m llama_lab plan model=llama2_7b lora.r=64 --tokens-per-s 3000"
    parser.add_argument("--tokens-per-s", type=take.positive, help="throughput to count the time with")
    options = _data_options(parser, words)
    from llama_lab.plan import plan

    return plan(*options)


def _data(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Show the rows of a data set as the model reads them, and check them. Exit codes as of plan."
    parser.epilog = "example:\n  python -m llama_lab data dataset=jsonl dataset.path=my.jsonl --html rows.html"
    options = _data_options(parser, words)
    from llama_lab.plan import data

    return data(*options)


def _compare(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = (
        "Rank runs and show only the settings that differ. Runs that differ only in their seed are one row; a winner "
        "is called so only where it is outside the noise. `compare diff A B` is the verb diff."
    )
    parser.epilog = (
        'example:\n  python -m llama_lab compare outputs/ --where "lora.r>=16 and quant=nf4" --html report.html'
    )
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="runs, studies, or folders above them")
    parser.add_argument("--sort", metavar="KEY", help="rank by another number, or order by a setting")
    parser.add_argument("--reverse", action="store_true", help="turn the order round")
    parser.add_argument("--columns", metavar="KEY,KEY", help="show these instead")
    parser.add_argument("--where", metavar="EXPRESSION", help='only these runs, such as "lora.r>=16 and quant=nf4"')
    formats = ("table", "csv", "json", "markdown")
    parser.add_argument("--format", type=take.one_of(formats), choices=formats, default="table", help="default: table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no network")
    parser.add_argument("--wandb-report", action="store_true", help="make a report on W&B; needs an account")
    parser.add_argument("--live", action="store_true", help="keep the table current while runs are running")
    if words[:1] == ["diff"] and not Path("diff").exists():
        return run_verb(words)
    args = parser.parse_args(words)
    if args.live and (args.html or args.wandb_report or args.format != "table"):
        raise ConfigError("--live shows a table in the terminal. Leave --html, --wandb-report and --format out.")
    from llama_lab.compare.show import Options, compare

    args.columns = [word.strip() for word in (args.columns or "").split(",") if word.strip()]
    return compare(Options(**vars(args)))


def _diff(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "What differs between two runs: settings, data, packages, code, results, and their curves."
    parser.epilog = "example:\n  python -m llama_lab diff outputs/study/0 outputs/study/3"
    parser.add_argument("one", metavar="A", type=Path, help="the folder of a run")
    parser.add_argument("other", metavar="B", type=Path, help="the folder of another one")
    args = parser.parse_args(words)
    from llama_lab.compare.diff import diff

    return diff(args.one, args.other)


def _dashboard(parser: argparse.ArgumentParser, words: list[str]) -> int:
    parser.description = "Show a study in optuna-dashboard, on this machine's loopback address only; Ctrl-C ends it."
    parser.epilog = "example:\n  python -m llama_lab dashboard outputs/lora_quant"
    parser.add_argument("study", metavar="STUDY", type=Path, help="the folder of a study, such as outputs/lora_quant")
    parser.add_argument("--port", type=_count, default=0, help="default: one that is free")
    args = parser.parse_args(words)
    from llama_lab.compare.dashboard import dashboard

    return dashboard(args.study, args.port)


def _data_options(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], Options]:
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="settings of the run, as without the verb")
    parser.add_argument("--rows", type=_count, default=3, help="rows to show (default: 3)")
    parser.add_argument("--ids", action="store_true", help="show each token with its id")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the first 500 rows")
    args = parser.parse_intermixed_args(words)
    for word in args.settings:
        if "=" not in word and word[:1] not in ("~", "+"):
            raise ConfigError(f"'{word}' is no setting. Settings are typed KEY=VALUE. See: {parser.prog} --help")
    from llama_lab.plan import Options

    return args.settings, Options(
        num_rows=args.rows, ids=args.ids, html=args.html, tokens_per_s=getattr(args, "tokens_per_s", None)
    )


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word} is no whole number")
    return int(word)


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, help="longest answer in tokens (default: the run's own)")
    parser.add_argument("--sample", action="store_true", help="draw the answer instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, help="of --sample (default: the run's own)")
    parser.add_argument("--top-p", type=float, help="of --sample (default: the run's own)")
    parser.add_argument("--base", action="store_true", help="show the base model's answer as well")
    parser.add_argument("--seed", type=_seed, default=0, help="of --sample (default: 0)")


def _seed(word: str) -> int:
    if not (word.isdecimal() and int(word) < 2**32):
        raise argparse.ArgumentTypeError(f"{word} is no whole number from 0 to 4294967295")
    return int(word)


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """What the words change of the run's own generation settings."""
    given = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
    changed: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if args.sample:
        changed["do_sample"] = True
    return changed


VERBS: dict[str, Callable[[argparse.ArgumentParser, list[str]], int]] = {
    "plan": _plan,
    "data": _data,
    "compare": _compare,
    "diff": _diff,
    "dashboard": _dashboard,
    "generate": _generate,
    "chat": _chat,
    "evaluate": take.evaluate,
    "merge": take.merge,
    "export": take.export,
    "serve": take.serve,
    "push": take.push,
    "repro": take.repro,
}
ALIASES = {"reproduce": "repro"}
