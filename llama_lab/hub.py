"""Errors of the hub, told as one message; and whether a run needs the hub at all."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings, RunConfig
from llama_lab.dataset_config import EMBEDDED_DATASETS
from llama_lab.errors import DataError, LlamaLabError, ModelError
from llama_lab.lock import below


def needs_hub(config: RunConfig) -> bool:
    """Whether weights or rows are named by a hub id; nothing else may touch the network."""
    model_on_hub = config.model.source is ModelSource.hub and not Path(config.model.name).expanduser().is_dir()
    dataset = config.dataset
    return model_on_hub or (dataset.path is None and dataset.package is None and dataset.name not in EMBEDDED_DATASETS)


def is_reachable() -> bool:
    """Whether the hub answers; asked once before a run that names something on it.

    Without an answer its client tries again for more than a minute, also for what lies in the local cache.
    """
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if urllib.request.getproxies().get(address.scheme):
        return True  # only the proxy knows
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def commit_of(model: ModelSettings) -> str | None:
    """The commit of a model that was loaded from the hub; None for a folder and for embedded models."""
    from huggingface_hub import try_to_load_from_cache

    if model.source is not ModelSource.hub or Path(model.name).expanduser().is_dir():
        return None
    config = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    return Path(config).parent.name if isinstance(config, str) else None  # .../snapshots/COMMIT/config.json


def at_commit(model: ModelSettings, lock: dict[str, Any]) -> ModelSettings:
    """The model of a run as that has loaded it: at the commit in its run.json, also where a branch has moved on since.

    Args:
        lock: run.json; one without a commit, as of a run that has loaded nothing yet, changes nothing.
    """
    commit = below(lock, "model", "commit")
    return replace(model, revision=commit) if commit and model.source is ModelSource.hub else model


def dataset_snapshot(name: str, revision: str | None) -> str | None:
    """The folder of a data set that lies in the hub cache, such as one that `hf download` put there; None without."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


@contextmanager
def loading(
    name: str, key: str, revision: str | None = None, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Tell what goes wrong inside as `explain_hub` does; errors of ours go through as they are.

    Args:
        revision: the one that is asked for.
        passing: others that do.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (LlamaLabError, *passing)):
            raise
        raise explain_hub(error, name, key, revision) from error


def explain_hub(error: Exception, name: str, key: str, revision: str | None = None) -> LlamaLabError:
    """Why `name` could not be loaded, and what to do.

    Args:
        error: what transformers, datasets or huggingface_hub raised.
        name: the hub id or folder.
        key: the setting that named it, `model.name` or `dataset.name`.
        revision: the one that was asked for.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kind = ModelError if key == "model.name" else DataError
    chain = _chain(error)
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text:
        return kind(
            f"{key}={name} is gated on the hub. Accept its licence on the page of {name} while logged in, then set "
            "HF_TOKEN to a token of that account."
        )
    if any(isinstance(e, RevisionNotFoundError) for e in chain) or "is not a valid git identifier" in text:
        return kind(f"{key}={name} has no such revision. Type {key.split('.')[0]}.revision=main, or a commit.")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain) or "is not a valid model identifier" in text:
        return kind(
            f"{key}={name} was not found on the hub. Check the spelling; if it is private, set HF_TOKEN. "
            "A folder of yours is named by its path."
        )
    if _is_offline(chain, text):
        at = f" at revision {revision}" if revision else ""
        return kind(
            f"{key}={name}{at} is not in the local hub cache, and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set). Go online, download it beforehand on another machine, or type the path of a local copy."
        )
    return kind(f"{key}={name} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def _is_offline(chain: list[BaseException], text: str) -> bool:
    names = {cls.__name__ for e in chain for cls in type(e).__mro__}
    words = ("offline", "couldn't connect", "Couldn't reach", "Max retries", "cached files")
    return bool(names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"}) or any(
        word in text for word in words
    )


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return found
