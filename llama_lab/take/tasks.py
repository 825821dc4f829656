"""Tasks of lm-evaluation-harness, run by its own package on the model that is loaded."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_lab.errors import ConfigError, did_you_mean
from llama_lab.hub import is_reachable

SUFFIXES = (".yaml", ".yml")


def check_tasks(tasks: list[str]) -> None:
    """Refuse tasks that cannot be run, before a model is loaded; let the hub be asked where one needs it.

    Raises:
        ConfigError: lm-eval is not installed, or a task file is not there.
    """
    if not tasks:
        return
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs the pip package lm-eval, which is not installed. "
            "Type: python -m pip install 'lm-eval>=0.4.13'"
        )
    for task in tasks:
        if Path(task).suffix in SUFFIXES:
            name_in(Path(task))
    if any(Path(task).suffix not in SUFFIXES for task in tasks) and is_reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # the rows of a task that comes with lm-eval lie on the hub


def name_in(file: Path) -> str:
    """The name of a task file's task.

    Raises:
        ConfigError: the file is not there, or no task.
    """
    import yaml

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Lenient)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"--tasks {file} cannot be read: {reason}.") from None
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"--tasks {file} is no task of lm-eval: it has no line `task: NAME`.")
    return name


def task_manager(tasks: list[str]) -> Any:
    """lm-eval's own list of tasks.

    Raises:
        ConfigError: a name that it does not know.
    """
    from lm_eval.tasks import TaskManager

    folders = {Path(task).absolute().parent for task in tasks if Path(task).suffix in SUFFIXES}
    names = [task for task in tasks if Path(task).suffix not in SUFFIXES]
    manager = TaskManager(
        include_path=[str(folder) for folder in folders] or None,
        include_defaults=bool(names),  # reading them all takes seconds
    )
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"--tasks {name}: lm-eval has no such task.{hint} A file of yours ends in .yaml.")
    return manager


def run_tasks(
    model: Any, tokenizer: Any, tasks: list[str], *, limit: int | None, batch_size: int, chat_template: bool
) -> dict[str, float]:
    """Scores by TASK/METRIC.

    Args:
        tasks: names that lm-eval knows, or task files.
        limit: rows of each task; None takes all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with bars:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[name_in(Path(task)) if Path(task).suffix in SUFFIXES else task for task in tasks],
            task_manager=task_manager(tasks),
            limit=limit,
            apply_chat_template=chat_template,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {
        f"{task}/{key.removesuffix(',none')}": float(value)
        for task, scores in found["results"].items()
        for key, value in scores.items()
        if isinstance(value, int | float) and "stderr" not in key and key != "sample_len"
    }


def _lenient_loader() -> Any:
    import yaml

    class Lenient(yaml.SafeLoader):
        """Task files may call functions with tags of lm-eval's own, which are not of interest here."""

    Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)
    return Lenient


_Lenient: Any = _lenient_loader()
