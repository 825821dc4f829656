"""Verbs that answer: `generate` one request, `chat` many."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.checks import check_model
from llama_lab.config import GenerationSettings, RunConfig
from llama_lab.errors import ModelError, RunError
from llama_lab.lock import config_of
from llama_lab.process import prepare, quiet_libraries
from llama_lab.rundir import RunDir

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def generate(folder: Path, request: str, changed: dict[str, object], *, seed: int) -> None:
    """Print the run's answer to one request.

    Raises:
        RunError: the folder holds no finished run.
        ModelError: the base or the adapter cannot be loaded.
    """
    config, run_dir = open_run(folder)
    settings = replace(config.generation, **changed)  # type: ignore[arg-type]
    model, tokenizer = load_trained(config, run_dir)
    _ask(model, tokenizer, [*_first_turns(config, None), {"role": "user", "content": request}], settings, seed)


def chat(folder: Path, changed: dict[str, object], *, system: str | None, seed: int) -> None:
    """Talk with the run until /exit or the end of the input."""
    config, run_dir = open_run(folder)
    settings = replace(config.generation, **changed)  # type: ignore[arg-type]
    model, tokenizer = load_trained(config, run_dir)
    turns = _first_turns(config, system)
    print("Type a request; /reset forgets, /system TEXT sets a system prompt, /exit ends.", file=sys.stderr)
    while (line := _read_line()) is not None:
        word, _, rest = line.partition(" ")
        if word == "/exit":
            break
        if word == "/reset":
            turns = _first_turns(config, system)
        elif word == "/system":
            system = rest.strip() or None
            turns = _first_turns(config, system)
        elif word.startswith("/"):
            print(f"{word} is no command. There are /reset, /system TEXT and /exit.", file=sys.stderr)
        elif line.strip():
            turns.append({"role": "user", "content": line.strip()})
            turns.append({"role": "assistant", "content": _ask(model, tokenizer, turns, settings, seed)})


def open_run(folder: Path) -> tuple[RunConfig, RunDir]:
    """Settings and files of a run that has an adapter; nothing heavy is imported.

    Raises:
        RunError: there is no run, or no adapter yet.
        ModelError: its base is plainly not there.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder. A run lies in outputs/DATE/TIME.")
    run_dir = RunDir(folder)
    config = config_of(run_dir.read_lock())
    if not (run_dir.adapter / "adapter_config.json").is_file():
        raise RunError(f"{folder} has no adapter yet. Finish the run with: python -m llama_lab resume={folder}")
    check_model(config.model)
    return config, run_dir


def load_trained(config: RunConfig, run_dir: RunDir) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base, with the tokenizer and template that were saved with it.

    Raises:
        ModelError: the adapter does not fit the base, or is not whole.
    """
    prepare(config)
    from peft import PeftModel
    from transformers import AutoTokenizer

    from llama_lab.engine.choose import choose
    from llama_lab.engine.install import speed_up
    from llama_lab.model import load_base, set_special_tokens

    quiet_libraries(config)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.adapter)
    base = load_base(config.model, config.quant)
    set_special_tokens(base, tokenizer)
    try:
        model = PeftModel.from_pretrained(base, str(run_dir.adapter))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{run_dir.adapter} does not load on {config.model.name}: {reason}") from error
    if choose(config).speeds_up_model:
        speed_up(model)
    return model.eval(), tokenizer


def _ask(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, str]],
    settings: GenerationSettings,
    seed: int,
) -> str:
    import torch

    from llama_lab.generate import stream

    torch.manual_seed(seed)
    return stream(model, tokenizer, turns, settings)


def _first_turns(config: RunConfig, system: str | None) -> list[dict[str, str]]:
    system = system or config.dataset.system_prompt
    return [{"role": "system", "content": system}] if system else []


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
