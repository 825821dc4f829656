"""The commands of servers that others wrote, for an adapter or a merged model; OpenAI's protocol, loopback address."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llama_lab.choices import ModelSource, QuantType
from llama_lab.errors import ConfigError, RunError
from llama_lab.take.options import MERGE_FILE, Server
from llama_lab.take.source import Source, open_source

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""
NEEDS = {
    Server.transformers: (("fastapi", "uvicorn", "openai"), "transformers[serving]"),
    Server.vllm: (("vllm",), "vllm"),
    Server.llama_cpp: (
        ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"),
        "llama-cpp-python[server]",
    ),
}
"""Modules that a server needs, and the pip package that brings them."""
HOST = "127.0.0.1"


@dataclass(kw_only=True)
class ServeOptions:
    """What is asked for."""

    server: Server | None
    """None takes llama-cpp for a GGUF and transformers for everything else."""
    port: int
    dry_run: bool
    """Only print the command."""


def serve(path: Path, settings: list[str], options: ServeOptions) -> int:
    """Become the server; the exit code of a dry run.

    Raises:
        RunError: nothing is there that it could serve.
        ConfigError: the server is not installed, or the port cannot be had.
    """
    server = options.server or (Server.llama_cpp if path.suffix == ".gguf" else Server.transformers)
    command = command_of(server, path, settings, options.port)
    if not options.dry_run:
        _check_port(options.port)
    print(f"{shlex.join(command)}\nhttp://{HOST}:{options.port}/v1", flush=True)
    if options.dry_run:
        return 0
    modules, package = NEEDS[server]
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--with {server} needs {missing[0]}. Type: python -m pip install '{package}'")
    os.execvp(command[0], command)


def _check_port(port: int) -> None:
    """Refuse a port that another program has, or the system keeps; the server would say so after it has loaded."""
    with socket.socket() as here:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that has just ended is none
        try:
            here.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}. Type another one from 1024 on.") from None


def command_of(server: Server, path: Path, settings: list[str], port: int) -> list[str]:
    """The words that start a server.

    Raises:
        RunError: the path is of a kind that it does not serve.
    """
    where = ["--host", HOST, "--port", str(port)]
    if server is Server.llama_cpp or path.suffix == ".gguf":
        if not path.exists():
            raise RunError(f"{path}: there is no such file. A GGUF is made by: export RUN --gguf FILE")
        if server is not Server.llama_cpp or not path.is_file():
            raise RunError(f"--with {server}: {path} is not what it serves. A GGUF is made by: export RUN --gguf FILE")
        return [sys.executable, "-m", "llama_cpp.server", "--model", str(path), *where]
    if (path / MERGE_FILE).is_file():
        if server is Server.vllm:
            return ["vllm", "serve", str(path), *where]
        return [*_transformers(), str(path), *where]
    source = open_source(path, settings)
    if server is Server.vllm:
        return [*vllm_command(source), *where]
    raise RunError(
        f"{path} is an adapter, and the server of transformers takes whole models. Type: "
        f"python -m llama_lab merge {path} --to my_model, then serve my_model; or --with vllm, which takes adapters."
    )


def vllm_command(source: Source) -> list[str]:
    """vLLM with the adapter on its base.

    Raises:
        RunError: vLLM does not serve such an adapter.
    """
    if source.peft.get("use_dora") or source.peft.get("modules_to_save"):
        raise RunError(
            "vLLM serves plain LoRA, and this adapter has DoRA or modules trained in full. Merge it first: "
            f"python -m llama_lab merge {source.path} --to my_model, then vllm serve my_model"
        )
    rank = max([source.peft.get("r", 8), *(source.peft.get("rank_pattern") or {}).values()])
    allowed = next((r for r in VLLM_RANKS if r >= rank), None)
    if allowed is None:
        raise RunError(
            f"vLLM serves adapters up to rank {max(VLLM_RANKS)}, and this one has {rank}. Merge it first: "
            f"python -m llama_lab merge {source.path} --to my_model, then vllm serve my_model"
        )
    words = ["vllm", "serve", _base_of(source), "--enable-lora", "--max-lora-rank", str(allowed)]
    words += ["--lora-modules", _lora_module(source.path.absolute().name, str(source.adapter.absolute()))]
    if (source.adapter / "chat_template.jinja").is_file():
        words += ["--chat-template", str((source.adapter / "chat_template.jinja").absolute())]
    if source.config.quant.type is QuantType.nf4:
        words += ["--quantization", "bitsandbytes"]
    if source.config.model.revision:
        words += ["--revision", source.config.model.revision]
    return words


def _lora_module(name: str, path: str) -> str:
    # folders of a grid are named lora.r=8,...; vLLM takes NAME=PATH apart at every =, and what has a comma for JSON
    if set("=,") & set(name + path):
        return json.dumps({"name": name, "path": path}, ensure_ascii=False)
    return f"{name}={path}"


def _base_of(source: Source) -> str:
    model = source.config.model
    if model.source is ModelSource.hub:
        return model.name
    return str(source.peft.get("base_model_name_or_path") or model.name)


def _transformers() -> list[str]:
    beside = Path(sys.executable).with_name("transformers")
    return [str(beside) if beside.exists() else "transformers", "serve"]
