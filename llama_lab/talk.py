"""Verbs that answer: `generate` one request or a file of them, `chat` many turns; --base answers beside."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config import GenerationSettings, RunConfig
from llama_lab.data.turns import half_character
from llama_lab.errors import ConfigError, DataError
from llama_lab.process import forget_signals
from llama_lab.take.load import load_tokenizer_of, load_trained
from llama_lab.take.source import Source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llama_lab.data.templates import Messages

MAX_FILE_MIB = 64
"""Of a file of prompts, which is held in memory with all its answers: a hundred thousand prompts and more."""


@dataclass(kw_only=True)
class Talker:
    """A trained run that answers."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    seed: int
    context: int | None
    """Tokens for which the base has places, where it says so."""

    def encode(self, turns: Messages) -> list[int]:
        """The tokens of a conversation that ends with a user's turn.

        Raises:
            DataError: it is longer than the model's context.
        """
        from llama_lab.generate import encode_within

        return encode_within(turns, self.tokenizer, self.context, "The conversation")

    def stream(self, prompt: list[int], *, base: bool = False) -> str:
        """Print the answer to a prompt of tokens as it comes, and return it.

        Args:
            base: of the model without its adapter.
        """
        import torch

        from llama_lab.generate import stream

        torch.manual_seed(self.seed)
        with self.model.disable_adapter() if base else nullcontext():
            return stream(self.model, self.tokenizer, prompt, self.settings)

    def answers(self, prompts: list[list[int]], *, base: bool = False) -> list[str]:
        """The answers to many prompts of tokens, in batches."""
        import torch

        from llama_lab.generate import answer_encoded

        torch.manual_seed(self.seed)
        with self.model.disable_adapter() if base else nullcontext():
            return [text.strip() for text in answer_encoded(self.model, self.tokenizer, prompts, self.settings)]


def generate(source: Source, request: str, changed: dict[str, object], *, seed: int, base: bool) -> None:
    """Print the run's answer to one request.

    Raises:
        ModelError: the base or the adapter cannot be loaded.
        DataError: the request is longer than the model's context.
    """
    _check_whole(request, "The request")
    turns = [*_first_turns(source.config, None), {"role": "user", "content": request}]
    talker, [prompt] = open_talker(source, changed, seed, base, {"The request": turns})
    _answer_both(talker, prompt, prompt, base)


def answer_rows(
    source: Source, rows: list[dict[str, Any]], changed: dict[str, object], *, seed: int, base: bool
) -> None:
    """Print one JSON line a row of `read_prompts`: {"prompt" or "messages", "answer", and with `base` "base"}.

    Raises:
        DataError: a row is longer than the model's context.
    """
    first = _first_turns(source.config, None)
    asked = [row["messages"] if "messages" in row else [*first, _user(row["prompt"])] for row in rows]
    talker, prompts = open_talker(
        source, changed, seed, base, {f"--file, prompt {i}": turns for i, turns in enumerate(asked, 1)}
    )
    answers = talker.answers(prompts)
    beside = talker.answers(prompts, base=True) if base else [None] * len(rows)
    for row, text, other in zip(rows, answers, beside, strict=True):
        print(json.dumps(row | {"answer": text} | ({"base": other} if base else {}), ensure_ascii=False))


def chat(source: Source, changed: dict[str, object], *, system: str | None, seed: int, base: bool) -> None:
    """Talk with the run until /exit or the end of the input."""
    talker, _ = open_talker(source, changed, seed, base)
    turns = beside = _first_turns(source.config, system)  # the base has a conversation of its own
    print("Type a request; /reset forgets, /system TEXT sets a system prompt, /exit ends.", file=sys.stderr)
    while (line := _read_line()) is not None:
        word, _, rest = line.partition(" ")
        if word == "/exit":
            break
        if word in ("/reset", "/system"):
            system = (rest.strip() or None) if word == "/system" else system
            turns = beside = _first_turns(source.config, system)
        elif word.startswith("/"):
            print(f"{word} is no command. There are /reset, /system TEXT and /exit.", file=sys.stderr)
        elif line.strip():
            try:
                _check_whole(line, "The request")
                asked = _user(line.strip())
                prompt = talker.encode([*turns, asked])
                answer, other = _answer_both(talker, prompt, talker.encode([*beside, asked]) if base else [], base)
            except DataError as error:  # too long, or the template takes no such turn: the conversation goes on
                print(f"{error} Type /reset to begin anew.", file=sys.stderr)
            except KeyboardInterrupt:
                forget_signals()
                print("\nStopped. This turn is forgotten; /exit ends.", file=sys.stderr)
            else:
                turns = [*turns, asked, {"role": "assistant", "content": answer}]
                beside = [*beside, asked, {"role": "assistant", "content": other}]


def open_talker(
    source: Source, changed: dict[str, object], seed: int, base: bool, asked: dict[str, Messages] | None = None
) -> tuple[Talker, list[list[int]]]:
    """Load base and adapter; with them the tokens of what will be asked. Call `prepare_verb` before.

    Args:
        asked: what will be asked, by its name in a message.
    Raises:
        DataError: one of `asked` is longer than the model's context; told before the base is loaded.
        ConfigError: the base's answers are wanted, and this adapter has changed the weights below it.
    """
    if base and source.peft.get("init_lora_weights") not in (True, None, *_LEAVE_THE_BASE):
        raise ConfigError(
            f"--base: an adapter that began as {source.peft['init_lora_weights']} changes the weights below it, so the "
            "base cannot be asked beside it. See samples.md in the run's folder for its answers."
        )
    settings = replace(source.config.generation, **changed)  # type: ignore[arg-type]
    from llama_lab.generate import encode_within
    from llama_lab.model import context_of

    tokenizer, context = load_tokenizer_of(source), context_of(source.config.model)
    encoded = [encode_within(turns, tokenizer, context, name) for name, turns in (asked or {}).items()]
    model, _ = load_trained(source, tokenizer)
    return Talker(model=model, tokenizer=tokenizer, settings=settings, seed=seed, context=context), encoded


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file: {"prompt": TEXT}, {"messages": [...]} that end with a user's turn, or "TEXT".

    Raises:
        DataError: names the first line that is none of these; or there are more than MAX_FILE_MIB.
    """
    try:
        with file.open("rb") as content:  # a pipe and a device have no size
            read = content.read(MAX_FILE_MIB * 2**20 + 1)
        if len(read) > MAX_FILE_MIB * 2**20:
            raise DataError(
                f"--file {file} holds more than {MAX_FILE_MIB} MiB, or never ends. Split it into smaller files."
            )
        # not splitlines(): JSON's texts may hold what that takes for an end of a line
        lines = read.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    rows = [_prompt_in(line, f"--file {file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f'--file {file} is empty. Each line holds {{"prompt": "a request"}}.')
    return rows


def _prompt_in(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where} is no JSON: {error}. Each line holds {{"prompt": "a request"}}.') from None
    if isinstance(row, str):
        row = {"prompt": row}
    texts = _texts_of(row) if isinstance(row, dict) else []
    if not any(text.strip() for text in texts):
        raise DataError(
            f'{where} has neither a prompt nor messages that end with a user\'s turn: {{"prompt": "a request"}}.'
        )
    for text in texts:
        _check_whole(text, where)
    return row  # type: ignore[no-any-return]


def _texts_of(row: dict[str, Any]) -> list[str]:
    """The prompt, or what the turns of a chat that ends with a user's say; empty where the row has neither."""
    turns = row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt")}]
    if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
        return []
    said = [(turn.get("role"), turn.get("content")) for turn in turns]
    if said[-1][0] != "user" or not all(isinstance(role, str) and isinstance(text, str) for role, text in said):
        return []
    return [text for _, text in said]


def _check_whole(text: str, where: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        DataError: the text has bytes that are no UTF-8, or half a character.
    """
    if (place := half_character(text)) is not None:
        raise DataError(f"{where}: character {place + 1} is no whole Unicode character. Take it out.")


def _answer_both(talker: Talker, prompt: list[int], beside: list[int], base: bool) -> tuple[str, str]:
    if not base:
        return talker.stream(prompt), ""
    print("Base model:")
    other = talker.stream(beside, base=True)
    print("With the adapter:")
    return talker.stream(prompt), other


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _first_turns(config: RunConfig, system: str | None) -> Messages:
    system = system or config.dataset.system_prompt
    return [{"role": "system", "content": system}] if system else []


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin is not None and sys.stdin.isatty() else "")
    except (EOFError, RuntimeError):  # the latter where there is no input at all
        return None


_LEAVE_THE_BASE = ("gaussian", "eva")
"""Starts of an adapter that leave the weights below it as they were."""
