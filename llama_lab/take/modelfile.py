"""Ollama's Modelfile: the chat template of the training in Go's template language, and where an answer stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_lab.config import GenerationSettings
from llama_lab.data.templates import TEMPLATE_NAMES, read_template

LLAMA2 = """\
[INST] {{ if .System }}<<SYS>>
{{ .System }}
<</SYS>>

{{ end }}{{ .Prompt }} [/INST]{{ if .Response }} {{ .Response }} EOSBOS{{ end }}"""

TEMPLATES = {
    "llama2": LLAMA2,
    "codellama": LLAMA2,
    "chatml": """\
{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}<|im_start|>user
{{ .Prompt }}<|im_end|>
<|im_start|>assistant
{{ .Response }}<|im_end|>
""",
    "alpaca": """\
{{ if .System }}{{ .System }}{{ else }}Below is an instruction that describes a task. \
Write a response that appropriately completes the request.{{ end }}
{{- range .Messages }}{{ if eq .Role "user" }}

### Instruction:
{{ .Content }}

### Response:
{{ else if eq .Role "assistant" }}{{ .Content }}EOS{{ end }}{{ end }}""",
    "guanaco": """\
{{ if .System }}{{ .System }}
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}### Human: {{ .Content }}### Assistant:\
{{ else if eq .Role "assistant" }} {{ .Content }}EOS{{ end }}{{ end }}""",
}
"""By the name of the shipped template; EOS and BOS stand for the tokenizer's. The first BOS is written by llama.cpp.

Ollama cuts a template with .Response there when it asks for an answer, and fills it in for answers that were given.
tests/unit/test_modelfile.py compares them with the templates of the training.
"""

STOPS = {"guanaco": ["### Human:"], "alpaca": ["### Instruction:"], "llama2": ["[INST]"], "codellama": ["[INST]"]}
"""What begins another turn: a model that goes on past its EOS is stopped there."""


def modelfile(gguf: Path, tokenizer: Any, generation: GenerationSettings, system: str | None) -> str:
    """The Modelfile for a GGUF beside it."""
    name = template_name(tokenizer)
    lines = [f"# ollama create {gguf.stem} -f {gguf.with_suffix('.Modelfile').name}", f"FROM ./{gguf.name}"]
    if name is None:
        lines.append("# The template is none of llama_lab's own; Ollama reads the one in the GGUF.")
    else:
        text = go_template(name, tokenizer.eos_token, tokenizer.bos_token or "")
        lines.append(f'TEMPLATE """{text}"""')
    for stop in [tokenizer.eos_token, *STOPS.get(name or "", [])]:
        lines.append(f'PARAMETER stop "{stop}"')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    sampled = generation.do_sample
    lines.append(f"PARAMETER temperature {generation.temperature if sampled else 0:g}")
    if sampled:
        lines.append(f"PARAMETER top_p {generation.top_p:g}")
    if generation.repetition_penalty != 1:
        lines.append(f"PARAMETER repeat_penalty {generation.repetition_penalty:g}")
    return "\n".join(lines) + "\n"


def go_template(name: str, eos: str, bos: str) -> str:
    """A shipped template in Go's language for these special tokens."""
    return TEMPLATES[name].replace("EOS", eos).replace("BOS", bos)


def template_name(tokenizer: Any) -> str | None:
    """The shipped template that a tokenizer has; None for one of its own."""
    has = _comparable(tokenizer.chat_template or "")
    return next((name for name in TEMPLATE_NAMES if _comparable(read_template(name)) == has), None)


def _comparable(template: str) -> str:
    # set_template writes a space behind the BOS for some tokenizers; llama.cpp writes that space itself
    return template.replace("{{- bos_token + ' ' -}}", "{{- bos_token -}}").strip()
