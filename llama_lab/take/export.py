"""`export`: a GGUF with its Modelfile for llama.cpp and Ollama, or the command that serves the adapter with vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from llama_lab.config import GenerationSettings
from llama_lab.data.templates import encode_prompt
from llama_lab.errors import RunError
from llama_lab.take.gguf_file import answers_of, check_file, convert, without_marks
from llama_lab.take.load import tokenizer_in
from llama_lab.take.merge import merge_into
from llama_lab.take.modelfile import modelfile
from llama_lab.take.options import MERGE_FILE, MODELFILE, GgufKind, MergeOptions, OutDtype
from llama_lab.take.source import Source
from llama_lab.take.target import new_file
from llama_lab.take.ticker import Ticker

MERGED_IN = {
    GgufKind.f16: OutDtype.fp16,
    GgufKind.bf16: OutDtype.bf16,
    GgufKind.f32: OutDtype.fp32,
    GgufKind.q8_0: OutDtype.fp32,
}
"""The type of the merged weights that a kind of GGUF is made from."""
PROMPTS = ("How do I use the OpenAI API?", "Train Llama 2 7B in fp4.")
"""What the GGUF is asked when it is loaded back."""
MAX_NEW_TOKENS = 24


def export_run(source: Source, file: Path, kind: GgufKind, options: MergeOptions) -> int:
    """Merge a run, verified, and export what came of it; the exit code.

    Raises:
        RunError: the merge is not faithful, or the converter does not take the model.
    """

    def merged(folder: Path, tick: Ticker) -> Path:
        folder.mkdir()
        merge_into(folder, source, replace(options, dtype=MERGED_IN[kind]), tick)
        return folder

    _export(merged, file, kind, source.config.generation, source.config.dataset.system_prompt)
    return 0


def export_merged(folder: Path, file: Path, kind: GgufKind) -> int:
    """Export a folder that merge made; the exit code.

    Raises:
        RunError: it is no such folder, or the converter does not take it.
    """
    if not (folder / MERGE_FILE).is_file():
        raise RunError(f"{folder} has no {MERGE_FILE}, so merge did not make it. Type the folder of a run.")
    transformers.utils.logging.disable_progress_bar()
    _export(lambda _, __: folder, file, kind, GenerationSettings(), None)
    return 0


def _export(
    merged: Callable[[Path, Ticker], Path],
    file: Path,
    kind: GgufKind,
    generation: GenerationSettings,
    system: str | None,
) -> None:
    """Write the file and its Modelfile.

    Args:
        merged: gives the folder of the model; may make the one that it is told of.
    """
    with Ticker() as tick, new_file(file, "--gguf") as partial:
        model = merged(partial.with_name("merged"), tick)
        tokenizer: Any = tokenizer_in(model)
        tick(f"converting to {kind}")
        convert(_plain_template(model, partial.with_name("plain") / file.stem), partial, kind)
        tick("loading it back")
        num_tensors = check_file(partial, model, tokenizer.eos_token_id)
        told = _compare(partial, model, tokenizer, kind)
        text = modelfile(file, tokenizer, generation, system)
    beside = file.with_suffix(MODELFILE)
    beside.write_text(text, encoding="utf-8")
    print(f"Written: {file} ({file.stat().st_size / 2**20:,.0f} MiB, {num_tensors} tensors, {kind}), read back whole.")
    print(told)
    print(f"Ollama:    ollama create {file.stem} -f {beside}")
    print(f"llama.cpp: llama-cli -m {file}")


def _plain_template(model: Path, work: Path) -> Path:
    """The merged folder with a chat template that every reader understands; the GGUF is known by the name of `work`."""
    work.mkdir(parents=True)
    for path in model.iterdir():
        if path.name == "chat_template.jinja":
            (work / path.name).write_text(without_marks(path.read_text(encoding="utf-8")), encoding="utf-8")
        elif path.name == "tokenizer_config.json":
            settings = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(settings.get("chat_template"), str):
                settings["chat_template"] = without_marks(settings["chat_template"])
            (work / path.name).write_text(json.dumps(settings), encoding="utf-8")
        elif path.suffix == ".safetensors":
            (work / path.name).symlink_to(path.absolute())
        elif path.is_file():
            shutil.copy(path, work / path.name)
    return work


@torch.no_grad()
def _compare(file: Path, model: Path, tokenizer: Any, kind: GgufKind) -> str:
    """One line: how many greedy tokens of llama.cpp are those of transformers."""
    from transformers import AutoModelForCausalLM

    prompts = [encode_prompt([{"role": "user", "content": prompt}], tokenizer) for prompt in PROMPTS]
    given = answers_of(file, prompts, tokenizer.eos_token_id, MAX_NEW_TOKENS)
    if given is None:
        return "Its answers were not compared: that needs llama-cpp-python (python -m pip install llama-cpp-python)."
    merged: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    same = total = 0
    for ids, answer in zip(prompts, given, strict=True):
        out = merged.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        wanted = [token for token in out[0, len(ids) :].tolist() if token != tokenizer.eos_token_id]
        same += sum(a == b for a, b in zip(wanted, answer, strict=False))
        total += max(len(wanted), len(answer))
    return (
        f"llama.cpp answers {len(prompts)} prompts with {same} of {total} greedy tokens as transformers does ({kind})."
    )
