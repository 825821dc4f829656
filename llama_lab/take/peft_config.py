"""Whether an adapter_config.json is one that can be loaded, and whether its weights are those that it speaks of.

PEFT loads what both have in common and is silent about the rest: half of an adapter, or numbers that are none. No torch
is imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_lab.config import LLAMA_LINEAR, LLAMA_MODULES
from llama_lab.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
PREFIX = "base_model.model."
LORA = ".lora_"
DORA = "lora_magnitude_vector"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PEFTS_RANK = 8
"""Of a config that names none."""
PEFTS_TARGETS = ["q_proj", "v_proj"]
"""Of a Llama whose config names none."""
TIED = ("model.embed_tokens", "lm_head")
"""Modules that are one matrix in many Llamas."""
AGAIN = "Save the adapter again, or bring the file back as it was."


def check_config(peft: dict[str, Any], file: Path) -> None:
    """Refuse values that no adapter has been trained with, and adapters that are no LoRA.

    Raises:
        ModelError: names the key and what can stand there.
    """
    if peft.get("peft_type") != "LORA":
        raise ModelError(
            f"{file}: peft_type is {peft.get('peft_type')!r}, and llama_lab reads LoRA adapters alone (LORA)."
        )
    for key, (is_right, rule) in RULES.items():
        if peft.get(key) is not None and not is_right(peft[key]):
            raise ModelError(f"{file}: {key} is {peft[key]!r}, and must be {rule}. {AGAIN}")
    if peft.get("target_modules") == [] and not peft.get("target_parameters"):
        raise ModelError(f"{file}: target_modules is [], and must be {RULES['target_modules'][1]}. {AGAIN}")
    for key in ("r", "lora_alpha"):
        if key in peft and peft[key] is None:
            raise ModelError(f"{file}: {key} is null, and must be {RULES[key][1]}. {AGAIN}")


def check_weights(shapes: Shapes, peft: dict[str, Any], adapter: Path) -> None:
    """Refuse weights that the config does not speak of, and a config that speaks of others.

    Args:
        shapes: of the tensors in adapter_model.safetensors.
        peft: a config that `check_config` has seen.
    Raises:
        ModelError: names the first of them.
    """
    if not shapes:
        raise ModelError(f"{adapter} holds no weights: its adapter_model.safetensors is empty. Save it again.")
    modules = sorted({key.removeprefix(PREFIX).partition(LORA)[0] for key in shapes if LORA in key})
    if not peft.get("target_parameters"):  # whose weights have names of their own
        _check_targets(modules, peft, adapter)
    asked = [name for name in peft.get("modules_to_save") or [] if _is_of_a_llama(name)]
    saved = [name for name in asked if not any(f".{name}." in key for key in shapes)]
    if saved and peft.get("task_type") == "CAUSAL_LM":  # of a model that scores, PEFT adds names that it may not have
        raise _not_one(adapter, f"names {saved[0]} in modules_to_save", "the weights have no such module")
    if modules and bool(peft.get("use_dora")) is not any(DORA in key for key in shapes):
        has = "no" if peft.get("use_dora") else "the"
        raise _not_one(adapter, f"says use_dora={peft.get('use_dora')}", f"the weights have {has} magnitudes of DoRA")
    _check_ranks(shapes, peft, adapter)


def check_built(built: Iterable[str], shapes: Shapes, adapter: Path) -> None:
    """Refuse weights that are not all those of the layers that PEFT has built.

    Args:
        built: names of the model's weights, as PEFT calls them.
    Raises:
        ModelError: names the first layer that only one of them has.
    """
    in_model, in_file = ({key.partition(LORA)[0] for key in keys if LORA in key} for keys in (built, shapes))
    if missing := in_model - in_file:
        raise _not_one(adapter, f"covers {_first(missing)}", "the weights have no such layer")
    if unread := in_file - in_model:
        raise _not_one(adapter, f"leaves {_first(unread)} out", "the weights have it")


def _check_targets(modules: list[str], peft: dict[str, Any], adapter: Path) -> None:
    covers = _matcher(peft)
    if left := [name for name in modules if not covers(name)]:
        told = f"{len(left)} layers that it leaves out, such as {left[0]}"
        raise _not_one(adapter, f"has target_modules={_short(peft.get('target_modules'))}", f"the weights have {told}")
    targets = peft.get("target_modules")
    if peft.get("exclude_modules") or not isinstance(targets, list):
        return  # PEFT writes down what it has left out as well
    whole = peft.get("modules_to_save") or []  # which PEFT gives no LoRA
    for target in targets:
        if not _is_of_a_llama(target) or any(_is_within(target, name) for name in whole):
            continue
        if not any(_ends_with(name, target) for name in modules):
            raise _not_one(adapter, f"names {target} in target_modules", "the weights have no such layer")


def _is_of_a_llama(name: str) -> bool:
    """Whether a Llama has it; people list names of many kinds of models, of which PEFT takes those that there are."""
    return name.rpartition(".")[2] in LLAMA_MODULES


def _is_within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."


def _matcher(peft: dict[str, Any]) -> Callable[[str], bool]:
    """Which layers a config covers, as PEFT decides it: peft/tuners/tuners_utils.py, check_target_module_exists."""
    targets = PEFTS_TARGETS if peft.get("target_modules") is None else peft["target_modules"]
    targets = list(LLAMA_LINEAR) if targets == "all-linear" else targets
    # PEFT gives the other one of two that are tied the same LoRA
    tied = TIED if peft.get("ensure_weight_tying") and any(_is_named(name, targets) for name in TIED) else ()
    excluded = peft.get("exclude_modules") or []
    layers = peft.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers

    def covers(name: str) -> bool:
        if name in tied:
            return True
        if _is_named(name, excluded) or not _is_named(name, targets):
            return False
        if isinstance(targets, str) or not layers or name in targets:
            return True
        found = LAYER.search(name)
        return bool(found) and int(found[1]) in layers  # type: ignore[index]

    return covers


def _is_named(name: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(_ends_with(name, one) for one in names)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _check_ranks(shapes: Shapes, peft: dict[str, Any], adapter: Path) -> None:
    # as peft/utils/other.py, get_pattern_key; compiled once: EVA writes as many as there are layers
    patterns = [(re.compile(rf"(.*\.)?({key})$"), r) for key, r in (peft.get("rank_pattern") or {}).items()]
    general = peft.get("r", PEFTS_RANK)
    wrong = {}
    for key, shape in sorted(shapes.items()):
        name = key.removeprefix(PREFIX).partition(LORA)[0]
        wanted = next((r for pattern, r in patterns if pattern.match(name)), general)
        found = shape[0] if key.endswith("lora_A.weight") else shape[1] if key.endswith("lora_B.weight") else wanted
        if found != wanted:
            wrong[key] = (wanted, found)
    if wrong:
        key, (wanted, found) = next(iter(wrong.items()))
        raise _not_one(
            adapter,
            f"says r={wanted}",
            f"{len(wrong)} matrices have another rank, such as {found} in {key}",
            "or mend r",
        )


def _not_one(
    adapter: Path, config: str, weights: str, instead: str = "or bring adapter_config.json back"
) -> ModelError:
    return ModelError(
        f"{adapter}: adapter_config.json {config}, and {weights}. The two files are not of one adapter: save it "
        f"again, {instead}."
    )


def _first(names: set[str]) -> str:
    return min(names).removeprefix(PREFIX)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_pattern(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_regex(key) and is_right(one) for key, one in value.items())


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_layers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(layer, int) for layer in value))


_TARGETS = (lambda value: _is_regex(value) or _is_names(value), "a list of names, or a regular expression")
_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "a text")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (_is_scale, "a positive number"),
    "rank_pattern": (_is_pattern(_is_rank), "whole numbers from 1 by the names of layers"),
    "alpha_pattern": (_is_pattern(_is_scale), "positive numbers by the names of layers"),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": (_is_names, "a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "numbers of layers"),
    "use_dora": _BOOLEAN,
    "use_rslora": _BOOLEAN,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
}
"""What may stand in a config, where something does."""
