"""`push`: an adapter or a merged model to the hub with a model card. Nothing is sent without --send."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_lab.checks import HUB_ID
from llama_lab.choices import ModelSource
from llama_lab.data.files import expanded
from llama_lab.errors import ConfigError, RunError
from llama_lab.hub import is_reachable
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
        _check_secrets(folder)
        _show(folder, options)
        if options.send:
            _send(folder, options)
    return 0


def _stage_adapter(path: Path, settings: list[str], folder: Path, repository: str) -> None:
    source = open_source(path, settings)
    for file in sorted(source.adapter.iterdir()):
        if file.name in ADAPTER_FILES or TOKENIZER_FILES.fullmatch(file.name):
            shutil.copy(file, folder / file.name)
    # PEFT wrote the path that the base had on this machine
    base = base_name(source.config.model)
    revision = source.lock.get("model", {}).get("commit") or source.peft.get("revision")
    peft = source.peft | {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG_FILE).write_text(json.dumps(peft, indent=2, sort_keys=True), encoding="utf-8")
    text = card(source, Loading(is_adapter=True, repository=repository))
    (folder / "README.md").write_text(text, encoding="utf-8")
    is_folder = source.config.model.source is ModelSource.hub and expanded(source.config.model.name).is_dir()
    if is_folder and "/" not in base:
        print(f"Note: the base is a folder of yours; others have to find {base} themselves. The card names it so.")


def _stage_merged(path: Path, folder: Path, repository: str) -> None:
    for file in sorted(path.iterdir()):
        if MERGED_FILES.fullmatch(file.name) or TOKENIZER_FILES.fullmatch(file.name) or file.name == MERGE_FILE:
            (folder / file.name).symlink_to(file.absolute())  # weights are large
    readme = (path / "README.md").read_text(encoding="utf-8") if (path / "README.md").is_file() else ""
    readme = readme.replace("PATH_OR_REPOSITORY", repository)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    if not json.loads((path / MERGE_FILE).read_text(encoding="utf-8")).get("is_faithful"):
        print("Note: this merge is not faithful (it was written with --force); its card says so.")


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
