"""`push`: an adapter or a merged model to the hub with a model card. Nothing is sent without --send."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_lab.checkpoints import damage
from llama_lab.checks import HUB_ID
from llama_lab.choices import ModelSource
from llama_lab.data.files import expanded
from llama_lab.errors import ConfigError, RunError
from llama_lab.hub import is_reachable
from llama_lab.lock import below
from llama_lab.take.card import Loading, base_name, card
from llama_lab.take.options import MERGE_FILE
from llama_lab.take.secrets import secrets_in
from llama_lab.take.source import CONFIG_FILE, open_source

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors", "generation_config.json")
TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|chat_template\.jinja|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt)"
)
MERGED_FILES = re.compile(
    r"(model.*\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json)"
)
"""Only what loading needs is sent: no optimizer, no run.json (it holds uncommitted code), no log."""
INDEX_FILE = "model.safetensors.index.json"


@dataclass(kw_only=True)
class PushOptions:
    """What is asked for."""

    repository: str
    send: bool
    private: bool


def push(path: Path, settings: list[str], options: PushOptions) -> int:
    """Show exactly what would be sent, and send it with `send`; the exit code.

    Raises:
        ConfigError: the repository is no OWNER/NAME.
        RunError: there is nothing to send, a secret is in it, no token is set, or the hub does not answer.
    """
    if "/" not in options.repository or not HUB_ID.fullmatch(options.repository):
        raise ConfigError(f"--repo {options.repository} is no OWNER/NAME, such as --repo me/llama-2-7b-guanaco.")
    with TemporaryDirectory(prefix="llama_lab-push-") as work:
        folder = Path(work)
        if (path / MERGE_FILE).is_file():
            _stage_merged(path, folder, options.repository)
        else:
            _stage_adapter(path, settings, folder, options.repository)
        _check_readable(folder)
        _check_secrets(folder)
        _show(folder, options)
        if options.send:
            _send(folder, options)
    return 0


def _stage_adapter(path: Path, settings: list[str], folder: Path, repository: str) -> None:
    source = open_source(path, settings)
    for file in _files(source.adapter):
        if file.name in ADAPTER_FILES or TOKENIZER_FILES.fullmatch(file.name):
            shutil.copy(file, folder / file.name)
    # PEFT wrote the path that the base had on this machine
    base = base_name(source.config.model)
    revision = below(source.lock, "model", "commit") or source.peft.get("revision")
    peft = source.peft | {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG_FILE).write_text(json.dumps(peft, indent=2, sort_keys=True), encoding="utf-8")
    text = card(source, Loading(is_adapter=True, repository=repository))
    (folder / "README.md").write_text(text, encoding="utf-8")
    is_folder = source.config.model.source is ModelSource.hub and expanded(source.config.model.name).is_dir()
    if is_folder and "/" not in base:
        print(f"Note: the base is a folder of yours; others have to find {base} themselves. The card names it so.")


def _stage_merged(path: Path, folder: Path, repository: str) -> None:
    files = _files(path)
    for file in files:
        if MERGED_FILES.fullmatch(file.name) or TOKENIZER_FILES.fullmatch(file.name) or file.name == MERGE_FILE:
            (folder / file.name).symlink_to(file.absolute())  # weights are large
    readme = _text_of(path / "README.md")
    is_faithful = _object_in(path / MERGE_FILE).get("is_faithful")
    if not isinstance(is_faithful, bool):
        raise _damaged(path / MERGE_FILE, "does not say whether the merge is faithful")
    weights = _object_in(path / INDEX_FILE).get("weight_map")
    names = {str(name) for name in weights.values()} if isinstance(weights, dict) else {"weight_map"}
    if lacking := names - {file.name for file in files}:
        raise _damaged(path / INDEX_FILE, f"names {min(lacking)}, which is not there")
    (folder / "README.md").write_text(readme.replace("PATH_OR_REPOSITORY", repository), encoding="utf-8")
    if not is_faithful:
        print("Note: this merge is not faithful (it was written with --force); its card says so.")


def _text_of(file: Path) -> str:
    if file.is_fifo():
        raise _damaged(file, "cannot be read: it is a pipe")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(file, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _object_in(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text_of(file))
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise _damaged(file, "holds no JSON object")
    return content


def _damaged(file: Path, what: str) -> RunError:
    return RunError(f"Nothing was sent: {file} {what}. Merge again, into another folder.")


def _files(folder: Path) -> list[Path]:
    """What can be sent: no pipe is read, which would wait for ever."""
    return sorted(file for file in folder.iterdir() if file.is_file())


def _check_readable(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if (reason := damage(file)) is not None:
            raise RunError(f"Nothing was sent: {file.name} cannot be read: {reason}. Bring it back as it was.")


def _check_secrets(folder: Path) -> None:
    found = [f"{file.name} holds {what}" for file, what in secrets_in(sorted(folder.iterdir()))]
    if found:
        raise RunError(f"Nothing was sent: {'; '.join(found)}. Take it out, and change it where it is in use.")


def _show(folder: Path, options: PushOptions) -> None:
    files = sorted(folder.iterdir())
    total = sum(file.stat().st_size for file in files)
    kind = "private" if options.private else "public"
    print(f"{'Sending' if options.send else 'Would send'} to {options.repository} ({kind}):")
    for file in files:
        print(f"  {file.name:<40} {file.stat().st_size:>14,} bytes")
    print(f"  {len(files)} files, {total:,} bytes\n")
    print((folder / "README.md").read_text(encoding="utf-8"))
    if not options.send:
        print("Nothing was sent. The same command with --send sends it.")


def _send(folder: Path, options: PushOptions) -> None:
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise RunError("Nothing was sent: no token of the hub is set. Type `hf auth login` once, or set HF_TOKEN.")
    if not is_reachable():
        raise RunError("Nothing was sent: the hub cannot be reached. Try again online.")
    api: Any = HfApi()
    try:
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        url = api.upload_folder(
            repo_id=options.repository, folder_path=folder, commit_message="Upload from llama_lab"
        ).commit_url
    except Exception as error:  # its errors are of many libraries: HTTP, proxies, permissions
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"The hub did not take {options.repository}: {reason}") from error
    print(f"Sent: {url}")
