"""A run of W&B's: begun online or offline, never asking, and never in the way of another run of the same process."""

from __future__ import annotations

import os
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.choices import TrackingMode
from llama_lab.config import TrackingSettings
from llama_lab.errors import ConfigError

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 60
OPEN: set[str] = set()
"""W&B's ids of the runs that this process has open; those of a stack (stacked/) share one."""
UNANSWERED = threading.Event()
"""W&B's server has not answered this process: it is not asked again."""


class NoAnswer(Exception):
    """W&B's server did not answer, and the runs that are open keep this one from being written offline."""


def has_key() -> bool:
    """Whether a key of W&B is set; nobody is asked for one.

    Raises:
        ConfigError: it is malformed, or another variable of W&B's is.
    """
    wandb = _wandb()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception as error:
        # a malformed key: W&B names it in its own words
        raise ConfigError(
            f"W&B does not accept the key that is set: {' '.join(str(error).split()).rstrip('.')}. "
            "Set it with `wandb login`, or type tracking.mode=offline."
        ) from error


def start_wandb(
    settings: TrackingSettings,
    mode: TrackingMode,
    *,
    folder: Path,
    run_id: str,
    name: str,
    tags: list[str],
    config: dict[str, Any],
) -> wandb.Run:
    """A W&B run with its files in `folder`; where the network does not answer, an offline one.

    Raises:
        NoAnswer: not even that.
        ConfigError: a variable of W&B's is malformed.
    """
    wandb = _wandb()
    kwargs: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "job_type": settings.job_type,
        "tags": tags,
        "name": name,
        "notes": settings.notes,
        "id": run_id,
        "resume": "allow",
        "config": config,
        "dir": str(folder),
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_S)),
            finish_timeout_raises=True,
            x_graphql_retry_max=2,
            silent=True,
            console="off",
            reinit="create_new",  # the runs of a stack share a process
        ),
    }
    try:
        return wandb.init(mode="offline" if UNANSWERED.is_set() else str(mode), **kwargs)
    except wandb.errors.CommError as error:
        UNANSWERED.set()
        if OPEN:  # a teardown would end them
            raise NoAnswer from error
        wandb.teardown()  # else the id is "in use"
        return wandb.init(mode="offline", **kwargs)


def _wandb() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own telemetry, which it sends offline as well
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))  # else a login says where it found the key
    except Exception as error:
        raise ConfigError(_wrong_setting(wandb, error)) from error
    return wandb


def _wrong_setting(wandb: Any, error: Exception) -> str:
    """Which of W&B's variables it does not take, found by giving it one at a time; their values may be secrets."""
    for name, value in sorted(os.environ.items()):
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except Exception as refusal:
            return (
                f"W&B does not take what {name} is set to: {_reason(refusal)}. Type `unset {name}`, or set it to what "
                "W&B takes; tracking=none does without W&B."
            )
    return (
        f"W&B does not take its settings: {_reason(error)}. Mend its file of settings; tracking=none does without W&B."
    )


def _reason(error: Exception) -> str:
    """W&B's own words, or those of pydantic, which checks its settings, without an address."""
    told = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    return " ".join(told.split()).rstrip(".")


def sync_command(folder: Path) -> str:
    """How to upload all offline runs in and below a folder, as one line for the person."""
    found = f"find {shlex.quote(str(folder))} -name 'offline-run-*' -exec wandb sync {{}} +"
    return f"W&B is offline. Upload the study and its trials with: {found}"
