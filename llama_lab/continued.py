"""model.adapter: a run that goes on with the adapter of another one. Nothing here imports torch until it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.choices import TrainerName
from llama_lab.config import LLAMA_LINEAR, OWN_ADAPTER, LoraSettings, RunConfig
from llama_lab.data.files import expanded
from llama_lab.errors import ConfigError, ModelError
from llama_lab.reward_model import HEAD, REWARD_MODULES, is_reward_adapter
from llama_lab.rundir import RunDir
from llama_lab.same_base import was_exchanged
from llama_lab.take.fits import check_fits
from llama_lab.take.peft_config import check_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"


def check_adapter(config: RunConfig) -> None:
    """Refuse an adapter that is not there, is of another base, or has other sizes than lora.* says.

    Raises:
        ModelError: there is no whole adapter, or it does not fit the base.
        ConfigError: the settings differ; says all the words that make them agree.
    """
    if config.model.adapter is None:
        return
    name, folder = config.model.adapter, adapter_folder(config.model.adapter)
    try:
        peft = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings = _settings_of(peft)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"model.adapter={name}: {folder / CONFIG_FILE} cannot be read as that of a LoRA: {error}."
        ) from None
    check_config(peft, folder / CONFIG_FILE)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"model.adapter={name}: {folder} has no adapter_model.safetensors. Name a run that has ended.")
    _check_kind(peft, config)
    _check_base(folder, config)
    check_fits(folder, peft, config.model)
    here = _words_of(config.lora)
    words = [f"{key}={value}" for key, value in settings.items() if value != here[key]]
    if words:
        said = ", ".join(f"{key}={here[key]}" for key in settings if settings[key] != here[key])
        raise ConfigError(
            f"model.adapter={name} was trained with other settings than {said}, and goes on with its own. "
            f"Type {' '.join(words)}"
        )


def check_goes_on(config: RunConfig, name: str, before: RunConfig, before_name: str) -> None:
    """Refuse a run that could not go on with the adapter of another one, before that one is trained.

    Args:
        name, before_name: of the two runs, for the message.
    Raises:
        ConfigError: the settings that differ, or a reward model's adapter for a model of words.
    """
    keys = ("lora.r", "lora.alpha", "lora.use_rslora", "lora.use_dora", "lora.target_modules", "lora.modules_to_save")
    here, there = ({"model.name": of.model.name, **_words_of(of.lora)} for of in (config, before))
    words = [key for key in ("model.name", *keys) if here[key] != there[key]]
    if words:
        said, instead = (" ".join(f"{key}={of[key]}" for key in words) for of in (here, there))
        raise ConfigError(f"{name} goes on with the adapter of {before_name}, and has {said}. Type {instead} for both.")
    if before.trainer.name is TrainerName.reward and config.trainer.name is not TrainerName.reward:
        raise ConfigError(
            f"{name} would go on with a reward model, which {before_name} trains and which scores answers and writes "
            "none. Train it alone, and type trainer.reward_model=FOLDER."
        )


def continue_adapter(base: PreTrainedModel | PeftModel, name: str, adapter_name: str = OWN_ADAPTER) -> PeftModel:
    """The base with the adapter, ready to be trained further.

    Args:
        base: may hold adapters for the same layers already; the new one is then the active one.
        name: model.adapter.
    Raises:
        ModelError: PEFT cannot load it.
    """
    from peft import PeftModel

    folder = str(adapter_folder(name))
    try:
        if not isinstance(base, PeftModel):
            return PeftModel.from_pretrained(base, folder, adapter_name=adapter_name, is_trainable=True)
        base.load_adapter(folder, adapter_name, is_trainable=True)
        base.set_adapter(adapter_name)
        return base
    except Exception as error:
        raise ModelError(f"model.adapter={name} does not load: {' '.join(str(error).split())[:300]}") from error


def writes_answers(name: str) -> bool:
    """Whether model.adapter is the adapter of a model of words, not of scores.

    Raises:
        ModelError: there is no adapter.
    """
    return not is_reward_adapter(json.loads((adapter_folder(name) / CONFIG_FILE).read_text(encoding="utf-8")))


def take_weights(model: PeftModel, name: str) -> None:
    """Give a new reward model the LoRA weights of an adapter that writes answers; its score keeps its own start.

    The layers below the head are the same, and so are the names of their weights.

    Args:
        name: model.adapter.
    Raises:
        ModelError: the weights are not those of the model's layers.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    taken = load_peft_weights(str(adapter_folder(name)), device="cpu")
    other = {key for key in own.keys() ^ taken.keys() if HEAD not in key.split(".")}
    if other:
        raise ModelError(f"model.adapter={name} has other layers than the reward model, such as {min(other)}.")
    set_peft_model_state_dict(model, own | taken)


def adapter_folder(name: str) -> Path:
    """The folder with the adapter of a run, of a checkpoint, or of PEFT.

    Raises:
        ModelError: there is none.
    """
    path = expanded(name)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (path / "run.json").is_file():
        raise ModelError(f"model.adapter={name} {RunDir(path).lacks_adapter()}")
    what = "holds neither a run nor a PEFT adapter" if path.exists() else "is not there"
    raise ModelError(f"model.adapter={name} {what}. Name the folder of a finished run: outputs/DATE/TIME")


def _check_kind(peft: dict[str, Any], config: RunConfig) -> None:
    """A reward model has a score in place of its words: it goes on as a reward model only, and begins from an adapter
    that writes answers only where that trained nothing of the words.
    """
    name, scores = config.model.adapter, is_reward_adapter(peft)
    if scores and config.trainer.name is not TrainerName.reward:
        raise ConfigError(
            f"model.adapter={name} is a reward model, which scores answers and writes none. Type "
            f"trainer.rewards=[reward_model] trainer.reward_model={name} to learn from its scores."
        )
    targets = peft["target_modules"]
    trained = [*(targets if isinstance(targets, list) else []), *(peft.get("modules_to_save") or [])]
    if config.trainer.name is TrainerName.reward and any(part.split(".")[-1] == "lm_head" for part in trained):
        raise ConfigError(
            f"model.adapter={name} trained lm_head as well, in whose place a reward model has its score. Leave "
            "model.adapter out, or name an adapter of other layers."
        )


def _check_base(folder: Path, config: RunConfig) -> None:
    """A run beside the adapter knows which base it was trained on."""
    lock = folder.parent / "run.json"
    if folder.name != "adapter" or not lock.is_file():
        return
    try:
        began = json.loads(lock.read_text(encoding="utf-8"))
        theirs = began["config"]["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model.adapter={config.model.adapter}: {lock} cannot be read: {error!r}.") from None
    if theirs != config.model.name:
        raise ModelError(
            f"model.adapter={config.model.adapter} was trained on {theirs}, and the run loads {config.model.name}. "
            f"Type model= with the choice for {theirs}, or model.name={theirs}."
        )
    if differs := was_exchanged(began, config.model):
        raise ModelError(
            f"model.adapter={config.model.adapter} was trained on another base: {differs}. Bring the folder back as it "
            "was, or leave model.adapter out."
        )


def _settings_of(peft: dict[str, Any]) -> dict[str, str]:
    """What an adapter_config.json says, in our words."""
    init = peft.get("init_lora_weights", True)
    targets = peft["target_modules"]
    saved = peft.get("modules_to_save") or []
    return {
        "lora.r": str(peft["r"]),
        "lora.alpha": f"{peft['lora_alpha']:g}",
        "lora.init": "default" if init is True else str(init),
        "lora.use_rslora": str(bool(peft.get("use_rslora"))).lower(),
        "lora.use_dora": str(bool(peft.get("use_dora"))).lower(),
        "lora.target_modules": _listed(targets) if isinstance(targets, list) else str(targets),
        "lora.modules_to_save": _listed([name for name in saved if name not in REWARD_MODULES]),
    }


def _words_of(lora: LoraSettings) -> dict[str, str]:
    targets = lora.target_modules
    return {
        "lora.r": str(lora.r),
        "lora.alpha": f"{lora.alpha:g}",
        "lora.init": str(lora.init),
        "lora.use_rslora": str(lora.use_rslora).lower(),
        "lora.use_dora": str(lora.use_dora).lower(),
        "lora.target_modules": targets if isinstance(targets, str) else _listed(targets),
        "lora.modules_to_save": _listed(lora.modules_to_save),
    }


def _listed(names: list[str]) -> str:
    """As a word; PEFT writes the layers of all-linear with their full paths."""
    found = sorted({name.split(".")[-1] for name in names})
    return "all-linear" if set(found) == set(LLAMA_LINEAR) else f"[{','.join(found)}]"
