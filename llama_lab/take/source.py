"""The adapter that a verb works on: that of a run, one of its checkpoints, or a plain PEFT folder. No torch in here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llama_lab.checkpoints import damage
from llama_lab.checks import check_model
from llama_lab.choices import ModelSource
from llama_lab.compose import compose_tree, parse
from llama_lab.config import RunConfig
from llama_lab.continued import CONFIG_FILE
from llama_lab.errors import ConfigError, ModelError, RunError, no_folder
from llama_lab.explain import explain, no_value
from llama_lab.hub import at_commit
from llama_lab.known_keys import known_keys, unknown_key
from llama_lab.lock import config_of
from llama_lab.paths import CONF_DIR
from llama_lab.reward_model import is_reward_adapter
from llama_lab.rundir import RunDir
from llama_lab.same_base import was_exchanged
from llama_lab.take.fits import check_fits
from llama_lab.take.peft_config import check_config

GROUPS = ("model", "quant", "dataset", "tracking", "evaluate", "generation")
"""What words may change of a finished run: where things are found and how they are measured, not what was learned."""
BESIDE = ("generation_config.json", "tokenizer_config.json")
"""Files of an adapter that are copied, or read late."""
BASE = ("model=", "model.name=", "model.revision=")
"""How words that name a base begin."""
ROWS = ("dataset=", "dataset.name=", "dataset.path=", "dataset.package=")
"""How words that name rows begin."""


@dataclass(kw_only=True)
class Source:
    """An adapter and what is known of its base."""

    path: Path
    """As it was typed."""
    adapter: Path
    """The folder with adapter_config.json."""
    config: RunConfig
    """Of the run; of a plain folder what its adapter_config.json and the words say."""
    run_dir: RunDir | None
    """None for a plain PEFT folder."""
    peft: dict[str, Any]
    """adapter_config.json."""
    notes: list[str] = field(default_factory=list)
    """What was assumed of the base and a person should know."""
    assumes_rows: bool = False
    """Whether nothing says which rows to measure on, and those that come with llama_lab are taken."""

    @property
    def lock(self) -> dict[str, Any]:
        """run.json; empty for a plain folder."""
        return self.run_dir.read_lock() if self.run_dir else {}

    @property
    def result(self) -> dict[str, Any]:
        """result.json; empty where there is none."""
        return self.run_dir.read_result() if self.run_dir and self.run_dir.result.exists() else {}


def open_source(path: Path, words: list[str] | None = None) -> Source:
    """Find the adapter below `path` and check that it can be used; nothing heavy is imported.

    Args:
        path: a run's folder, a checkpoint of it, or a folder with adapter_config.json.
        words: KEY=VALUE that change where base and rows are found, such as model.name=FOLDER or dataset=sample.
    Raises:
        RunError: there is no adapter.
        ModelError: the adapter or its base is plainly not there, or they do not fit.
        ConfigError: a word that changes what was learned.
    """
    words = [_checked(word) for word in words or []]
    adapter, run_dir = _locate(path)
    peft = _read_config(adapter)
    if is_reward_adapter(peft):
        raise RunError(
            f"{path} is a reward model: it scores answers and writes none. Its accuracy on held-out pairs is in its "
            f"result.json; to learn from its scores, type trainer=grpo trainer.rewards=[reward_model] "
            f"trainer.reward_model={path}"
        )
    notes: list[str] = []
    lock = run_dir.read_lock() if run_dir is not None else None
    config = _assumed(adapter, peft, words, notes) if lock is None else _changed(config_of(lock), words)
    if lock is not None and not any(word.startswith(BASE) for word in words):
        config.model = at_commit(config.model, lock)
    check_model(config.model)
    if lock is not None and (differs := was_exchanged(lock, config.model)):
        notes.append(_other_base(path, config, words, differs))
    check_fits(adapter, peft, config.model)
    assumes_rows = run_dir is None and not any(word.startswith(ROWS) for word in words)
    return Source(
        path=path, adapter=adapter, config=config, run_dir=run_dir, peft=peft, notes=notes, assumes_rows=assumes_rows
    )


def _other_base(path: Path, config: RunConfig, words: list[str], differs: str) -> str:
    """The note that an adapter is put on another base than it was trained on, as the words ask for.

    Raises:
        ModelError: they do not: the folder's weights have been exchanged.
    """
    if any(word.startswith(("model=", "model.name=")) for word in words):
        return f"{path} was trained on another base: {differs}"
    raise ModelError(
        f"model.name={config.model.name} is not the base that {path} was trained on: {differs}. Type model.name= with "
        f"the folder that has it now, or model.name={config.model.name} to take this one all the same."
    )


def _locate(path: Path) -> tuple[Path, RunDir | None]:
    """The adapter's folder and its run; None for a plain folder."""
    if not path.is_dir():
        raise RunError(f"{path}: {no_folder(path)} A run lies in outputs/DATE/TIME.")
    if (path / CONFIG_FILE).is_file():
        above = next((p for p in list(path.absolute().parents)[:2] if (p / "run.json").is_file()), None)
        return path, RunDir(above) if above else None
    run_dir = RunDir(path)
    if (run_dir.adapter / CONFIG_FILE).is_file() and run_dir.lock.exists():
        return run_dir.adapter, run_dir
    if run_dir.lock.exists():
        raise RunError(f"{path} {run_dir.lacks_adapter()}")
    if (path / "config.json").is_file():
        raise RunError(f"{path} holds a whole model and no adapter. Type the folder of a run, or of a PEFT adapter.")
    inside = sorted(p.parent for p in path.glob("*/run.json"))[:1]
    hint = f" Did you mean {inside[0]}?" if inside else ""
    raise RunError(f"{path} holds neither a run (run.json) nor a PEFT adapter ({CONFIG_FILE}).{hint}")


def _read_config(adapter: Path) -> dict[str, Any]:
    file = adapter / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}. Save the adapter again.") from None
    if not isinstance(content, dict) or "peft_type" not in content:
        raise ModelError(f"{file} is no configuration of a PEFT adapter: it names no peft_type. Save it again.")
    check_config(content, file)
    if not (adapter / "adapter_model.safetensors").is_file():
        pickled = (
            " Its weights are a pickle (adapter_model.bin), which is not read."
            * (adapter / "adapter_model.bin").is_file()
        )
        raise ModelError(f"{adapter} has no adapter_model.safetensors.{pickled} Save it with save_pretrained.")
    for beside in (adapter / name for name in BESIDE if (adapter / name).is_file()):
        if (reason := damage(beside)) is not None:
            raise ModelError(f"{beside} cannot be read: {reason}. Bring it back as it was.")
    return content


def _checked(word: str) -> str:
    key, equals, _ = word.partition("=")
    if not equals:
        raise ConfigError(f"{no_value(word)} A request of several words stands in quotes.")
    if key not in known_keys():
        raise unknown_key(key.lstrip("+~"))
    if key.split(".")[0] not in (*GROUPS, "seed", "verbose"):
        raise ConfigError(f"{word}: this was learned with the adapter and stays as it is. Leave it out.")
    return word


def _changed(config: RunConfig, words: list[str]) -> RunConfig:
    """The settings of a run with some words changed; a group's word takes the whole group from conf/."""
    if not words:
        return config
    tree = OmegaConf.structured(config)
    composed = compose_tree(words)
    for word in words:
        key = word.partition("=")[0]
        if "." not in key and key in GROUPS:
            tree[key] = composed[key]
            continue
        try:
            OmegaConf.update(tree, key, OverridesParser.create().parse_override(word).value(), merge=True)
        except Exception as error:
            raise explain(error, word) from error
    return parse(tree)


def _assumed(adapter: Path, peft: dict[str, Any], words: list[str], notes: list[str]) -> RunConfig:
    """Settings of an adapter that no run stands beside."""
    keys = {word.partition("=")[0] for word in words}
    base = str(peft.get("base_model_name_or_path") or "")
    embedded = _embedded_choice(base)
    choice = [f"model={embedded or 'tiny'}"] if "model" not in keys else []
    quant = ["quant=none"] if not any(key.split(".")[0] == "quant" for key in keys) else []
    config = parse(compose_tree([*choice, *quant, *words]))
    if not keys & {"model", "model.name"} and not embedded:
        if not base:
            raise ModelError(f"{adapter / CONFIG_FILE} names no base model. Type model.name=FOLDER_OR_HUB_ID.")
        config.model = replace(
            config.model,
            name=base,
            source=ModelSource.hub,
            revision=peft.get("revision") or config.model.revision,
            chat_template=config.model.chat_template if "model.chat_template" in keys else None,
        )
    if quant:
        notes.append("The folder does not say how its base was stored; not quantised is assumed. Else type quant=nf4")
    return config


def _embedded_choice(base: str) -> str | None:
    """The choice of conf/model whose cache folder an adapter names as its base, on whichever machine that was."""
    if not base or Path(base).is_dir():
        return None
    key = Path(base).name.rpartition("-")[0]
    file = CONF_DIR / "model" / f"{key}.yaml"
    text = file.read_text(encoding="utf-8") if key and file.is_file() else ""
    return key if re.search(r"^source: (package|random)", text, flags=re.M) else None
