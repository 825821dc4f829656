"""The model card of an adapter or a merged model: what it is, what it learned, what it is worth, how it is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab import __version__
from llama_lab.checks import HUB_ID
from llama_lab.choices import ModelSource, QuantType
from llama_lab.config import ModelSettings
from llama_lab.data.files import expanded
from llama_lab.dataset_config import DatasetSettings
from llama_lab.lock import below
from llama_lab.results import number
from llama_lab.take.source import Source

EMBEDDED = {"smollm2_135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What an embedded base is called on the hub."""

LICENCES = {"llama-2": "llama2", "llama2": "llama2", "codellama": "llama2", "smollm2": "apache-2.0"}
"""Licences of bases, by what their names hold; asked where the base's own card does not say."""

METRICS = ("exact_match", "composes")


@dataclass(kw_only=True)
class Loading:
    """How the thing in the folder is loaded."""

    is_adapter: bool
    repository: str = "PATH_OR_REPOSITORY"


def card(source: Source, loading: Loading, merged: dict[str, Any] | None = None) -> str:
    """README.md for the hub. No path of this machine is in it.

    Args:
        merged: merge.json of a merged model.
    """
    base = base_name(source.config.model)
    parts = [
        _front_matter(source, loading, base),
        f"# {loading.repository.split('/')[-1] if '/' in loading.repository else 'A fine-tuned ' + base}\n",
        _summary(source, loading, base),
        _how_to_load(source, loading, base),
        _results(source),
        _merge(merged) if merged else "",
        _settings(source),
        _versions(source),
    ]
    return "\n".join(part for part in parts if part)


def base_name(model: ModelSettings) -> str:
    """What the base is called: its hub id where it has one, else the last name of its folder."""
    if model.source is not ModelSource.hub:
        return EMBEDDED.get(model.name, model.name)
    folder = expanded(model.name)
    if not folder.is_dir():
        return model.name
    named = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path"))
    return named if "/" in named and HUB_ID.fullmatch(named) else folder.resolve().name


def licence_of(model: ModelSettings) -> str | None:
    """The hub's name of the base's licence: as its own card says, else as its name tells; None where neither does."""
    readme = expanded(model.name) / "README.md"
    if model.source is ModelSource.hub and readme.is_file():
        found = re.search(
            r"^---\n.*?^license:\s*(\S+)", readme.read_text(encoding="utf-8", errors="replace"), flags=re.S | re.M
        )
        if found:
            return found[1].strip("\"'")
    name = base_name(model).lower()
    return next((licence for word, licence in LICENCES.items() if word in name), None)


def data_name(dataset: DatasetSettings) -> str:
    """What the rows are called; of a file its name alone."""
    if dataset.path is not None:
        return Path(dataset.path).name
    return f"{dataset.package}/{dataset.file}" if dataset.package else str(dataset.name)


def _front_matter(source: Source, loading: Loading, base: str) -> str:
    lines = ["---"]
    if "/" in base:
        lines += [f"base_model: {base}", f"base_model_relation: {'adapter' if loading.is_adapter else 'finetune'}"]
    lines += [f"library_name: {'peft' if loading.is_adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if licence := licence_of(source.config.model):
        lines.append(f"license: {licence}")
    dataset = source.config.dataset
    if source.run_dir and dataset.name and "/" in dataset.name:
        lines += ["datasets:", f"- {dataset.name}"]
    tags = ["llama_lab", "lora", *(["qlora"] if source.config.quant.type is not QuantType.none else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _summary(source: Source, loading: Loading, base: str) -> str:
    quant = source.config.quant
    stored = "unquantised" if quant.type is QuantType.none else f"{quant.type}-quantised"
    what = "LoRA adapter for" if loading.is_adapter else "A LoRA, merged into"
    rows = ""
    if source.run_dir:
        num = number(below(source.lock, "dataset", "num_train_rows"))
        rows = f", trained on {f'{num:,} rows of ' if num else ''}{data_name(source.config.dataset)}"
    licence = licence_of(source.config.model)
    told = f"The licence of the base, {licence}, applies." if licence else "The licence of the base applies."
    return f"{what} {base}{rows}, with the base {stored}. {told}\n"


def _how_to_load(source: Source, loading: Loading, base: str) -> str:
    extra = quantised = ""
    quant, dtype = source.config.quant, _dtype(source) if loading.is_adapter else ""
    kwargs = f", dtype={dtype}" if dtype else ""
    if loading.is_adapter and quant.is_4bit:
        extra = ", BitsAndBytesConfig"
        double = ", bnb_4bit_use_double_quant=True" * quant.double_quant
        computes = f", bnb_4bit_compute_dtype={dtype}" if dtype else ""
        quantised = f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{quant.type}"{double}{computes})'
        kwargs = f", quantization_config=quantised{kwargs}"
    where = base if loading.is_adapter else loading.repository
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{where}"{kwargs})']
    if quantised:
        lines = [f"quantised = {quantised}", *lines]
    if loading.is_adapter:
        lines = [*lines, f'model = PeftModel.from_pretrained(model, "{loading.repository}")']
    imports = [f"from transformers import AutoModelForCausalLM, AutoTokenizer{extra}"]
    imports = ["from peft import PeftModel", *imports] if loading.is_adapter else imports
    imports = ["import torch", *imports] if dtype else imports
    asked = [
        f'tokenizer = AutoTokenizer.from_pretrained("{loading.repository}")',
        'chat = [{"role": "user", "content": "How do I use the OpenAI API?"}]',
        'ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0], skip_special_tokens=True))",
    ]
    return "\n".join(["## Use\n", *_own_base(source, loading), "```python", *imports, "", *lines, *asked, "```", ""])


def _dtype(source: Source) -> str:
    """In what the run computed; empty where nothing says it."""
    said = below(source.lock, "model", "compute_dtype")
    return f"torch.{said}" if said else ""


def _own_base(source: Source, loading: Loading) -> list[str]:
    """What is to be known of a base that comes with llama_lab."""
    model = source.config.model
    if not loading.is_adapter or model.source is ModelSource.hub:
        return []
    if model.source is ModelSource.random:
        return ["The base is the random model that llama_lab makes for its tests (`model=tiny`); no hub has it.\n"]
    file = f"{model.file} of the pip package {model.package}"
    return [f"The base was {file}, whose weights are rounded; those of the hub give other numbers.\n"]


def _results(source: Source) -> str:
    result = source.result
    if result.get("status") != "ok":
        return ""
    rows = [("held-out loss, nats a token", result.get("eval_loss_before"), result.get("eval_loss"))]
    rows += [("perplexity", None, result.get("perplexity"))]
    rows += [(name.replace("_", " "), result.get(f"{name}_before"), result[name]) for name in METRICS if name in result]
    lines = [f"| {name} | {_number(before)} | {_number(after)} |" for name, before, after in rows]
    return "\n".join(["## Results\n", "| | base | trained |", "|---|---:|---:|", *lines, ""])


def _merge(merged: dict[str, Any]) -> str:
    lines = [
        f"Merged onto the {merged['onto']} weights, stored in {merged['dtype']}, and compared with the adapter on the "
        f"base that it was trained on, over {merged['num_tokens']:,} tokens of {merged['num_rows']} held-out rows:\n",
        "| | |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in fidelity_rows(merged)),
        "",
    ]
    if not merged["is_faithful"]:
        lines += [
            f"**Not faithful**: the divergence is above {merged['max_kl']:g}; it was written because of --force.\n"
        ]
    return "\n".join(["## Merge\n", *lines])


def fidelity_rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a comparison as a person reads them."""
    return [
        ("KL divergence, nats a token", _number(numbers["kl"])),
        ("greedy agreement", f"{numbers['greedy_agreement']:.1%}"),
        ("largest logit difference", _number(numbers["max_logit_diff"])),
        ("perplexity, merged", _number(numbers["perplexity"])),
        ("perplexity, adapter", _number(numbers["perplexity_adapter"])),
    ]


def _settings(source: Source) -> str:
    if source.run_dir is None:
        return ""
    config = source.config
    lora, trainer = config.lora, config.trainer
    rows = {
        "lora.r": lora.r,
        "lora.alpha": f"{lora.alpha:g}",
        "lora.dropout": lora.dropout,
        "quant.type": config.quant.type,
        "trainer.learning_rate": trainer.learning_rate,
        "trainer.lr_scheduler_type": trainer.lr_scheduler_type,
        "rows a step": trainer.effective_batch_size,
        "optimizer steps": source.result.get("num_steps"),
        "dataset.max_length": config.dataset.max_length,
        "data fingerprint": below(source.lock, "dataset", "fingerprint"),
        "seed": config.seed,
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Settings\n", "| | |", "|---|---|", *lines, ""])


def _versions(source: Source) -> str:
    names = ("llama_lab", "torch", "transformers", "peft", "trl", "bitsandbytes")
    known = {name: version for name in names if (version := below(source.lock, "versions", name))}
    told = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"Made with {told or f'llama_lab {__version__}'}.\n"


def _number(value: object) -> str:
    known = number(value)
    return "-" if known is None else f"{known:.4g}"
