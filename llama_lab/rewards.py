"""Rewards: what an answer is worth, each a small function found by its name. Nothing here imports torch.

A reward takes the prompt (the last request of the user), the answer of the model and the answer of the row (empty where
the rows are prompts alone), all texts, and returns a number; more is better. One of yours is named
package.module:function, and takes the same three.
"""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from llama_lab.errors import ConfigError, LlamaLabError, did_you_mean

Reward = Callable[[str, str, str], float]
"""(prompt, completion, answer) to its worth."""

COMMAND = "python -m llama_lab"
REWARD_MODEL = "reward_model"
"""The name of the reward that a run of trainer=reward gives (reward_model.py)."""


def composes(prompt: str, completion: str, answer: str) -> float:
    """1 for a llama_lab command that Hydra composes and llama_lab accepts, else 0, whatever was asked for."""
    return float(is_valid_command(completion.strip()))


def exact_match(prompt: str, completion: str, answer: str) -> float:
    """1 for the row's answer, white space around it aside, else 0."""
    return float(completion.strip() == answer.strip())


def length(prompt: str, completion: str, answer: str) -> float:
    """How near the completion's length is to the answer's: the shorter over the longer, in characters; 0 to 1."""
    sizes = len(completion.strip()), len(answer.strip())
    return min(sizes) / max(sizes) if max(sizes) else 1.0


REWARDS: dict[str, Reward] = {"composes": composes, "exact_match": exact_match, "length": length}
"""The rewards that have a short name."""
NEED_ANSWER = ("exact_match", "length")
"""Those that compare with the row's answer; the others do without one."""


@lru_cache(maxsize=4096)
def is_valid_command(text: str) -> bool:
    """Whether `python -m llama_lab ...` would start a run; nothing is started."""
    from llama_lab.compose import compose_words

    if not text.startswith(COMMAND):
        return False
    try:
        compose_words(shlex.split(text.removeprefix(COMMAND)))
    except (LlamaLabError, ValueError, OSError):  # a model may write a path that no file system takes
        return False
    return True


def check_rewards(names: list[str], reward_model: str | None) -> None:
    """Refuse a reward that cannot be found. No module of the user's is imported: it is read.

    Raises:
        ConfigError: names the reward and the nearest one, or what to type.
    """
    if not names:
        raise ConfigError(
            "trainer.rewards is empty, so no answer is better than another. Type trainer.rewards=[length]."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(
            f"trainer.rewards names {twice} twice. Type it once, and its weight in trainer.reward_weights."
        )
    numbers = [number_of(name) for name in names]
    alike = [name for name in names if numbers.count(number_of(name)) > 1]
    if alike:
        raise ConfigError(
            f"trainer.rewards: {' and '.join(alike)} would both be {number_of(alike[0])} in result.json. Give one "
            "of the functions another name."
        )
    if reward_model is not None and REWARD_MODEL not in names:
        raise ConfigError(
            f"trainer.reward_model={reward_model} is used by no reward. Type trainer.rewards=[{REWARD_MODEL}], or "
            f"[{','.join([REWARD_MODEL, *names])}]."
        )
    for name in names:
        if name == REWARD_MODEL and reward_model is None:
            raise ConfigError(
                "trainer.rewards names reward_model. Type trainer.reward_model=FOLDER of a trainer=reward."
            )
        if ":" in name:
            _check_function(name)
        elif name not in (*REWARDS, REWARD_MODEL):
            raise ConfigError(
                f"trainer.rewards names {name}.{did_you_mean(name, (*REWARDS, REWARD_MODEL))} There are: "
                f"{', '.join((*REWARDS, REWARD_MODEL))}; one of yours is typed package.module:function."
            )


def number_of(name: str) -> str:
    """What the mean of one reward is called in metrics.jsonl and result.json: reward_length, reward_FUNCTION, ..."""
    return name if name == REWARD_MODEL else f"reward_{name.rpartition(':')[2]}"


def import_rewards(names: list[str]) -> None:
    """Import what the names stand for, so that what cannot be is known before the base is loaded.

    Raises:
        ConfigError: as of `find_reward`.
    """
    for name in names:
        if name != REWARD_MODEL:
            find_reward(name)


def find_reward(name: str) -> Reward:
    """The function of a name.

    Raises:
        ConfigError: the module of the user's cannot be imported, or what is named there is no function.
    """
    if ":" not in name:
        return REWARDS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"trainer.rewards: {module} cannot be imported: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ConfigError(f"trainer.rewards: {name} is no function. Define {function}(prompt, completion, answer).")
    return found  # type: ignore[no-any-return]


def _check_function(name: str) -> None:
    module, _, function = name.partition(":")
    file = _file_of(module)
    if file is None:
        raise ConfigError(
            f"trainer.rewards names {name}, and there is no module {module} in the folder you are in or among what is "
            "installed. A reward of yours is typed package.module:function."
        )
    if file.suffix != ".py":
        return  # compiled: it is seen when it is imported
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"trainer.rewards names {name}, and {file} cannot be read: {error}.") from None
    names = set(_names_of(tree))
    if function not in names and "*" not in names:
        raise ConfigError(
            f"trainer.rewards names {name}, and {file} has no function {function}."
            f"{did_you_mean(function, names, f'{module}:{{}}')}"
        )


def _file_of(module: str) -> Path | None:
    """The file of a module, which is not imported; nor are the packages that it lies in."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for folder in sys.path:
        path = Path(folder or ".").joinpath(*parts)
        for file in (path.with_suffix(".py"), path / "__init__.py", *path.parent.glob(f"{path.name}.*.so")):
            if file.is_file():
                return file
    return None


def _names_of(tree: ast.AST) -> Iterable[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _names_of(node)
