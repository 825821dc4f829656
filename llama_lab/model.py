"""The frozen base and its tokenizer, by hub id, folder, pip package or seed."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.choices import Attention, ModelSource, QuantType
from llama_lab.config import ModelSettings, QuantSettings
from llama_lab.data.templates import TEMPLATE_NAMES, set_template
from llama_lab.embedded import materialise
from llama_lab.errors import ConfigError, ModelError
from llama_lab.hub import loading
from llama_lab.params import SIZES, ModelShape, shape_from_config
from llama_lab.quant import compute_dtype, dequantise_once, keep_trainable, quantization_config
from llama_lab.ranks import local_rank
from llama_lab.reward_model import HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def base_path(model: ModelSettings) -> str:
    """What transformers loads: the hub id or folder itself, or the local folder that an embedded model was put into."""
    return model.name if model.source is ModelSource.hub else str(materialise(model))


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer with the run's chat template and a pad token that is not the EOS.

    Raises:
        ModelError: it cannot be loaded, or has no EOS.
        ConfigError: no pad token beside the EOS is known, or model.pad_token is not in the vocabulary.
    """
    from transformers import AutoTokenizer

    with loading(model.name, "model.name", model.revision):
        tokenizer = AutoTokenizer.from_pretrained(
            base_path(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {model.name} has no end-of-sequence token, so a model could never stop. Type another "
            "model.name."
        )
    if model.chat_template is not None:
        set_template(tokenizer, model.chat_template)
    elif not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer of {model.name} has no chat template. Type model.chat_template={'|'.join(TEMPLATE_NAMES)}"
        )
    tokenizer.pad_token = _pad_token(tokenizer, model)
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(
    model: ModelSettings, quant: QuantSettings, *, dense: bool = True, scores: bool = False
) -> PreTrainedModel:
    """The frozen base, quantised, on this process's device.

    Args:
        dense: on a CPU with the memory for it, keep 4-bit weights dequantised beside themselves.
        scores: with one score in place of its words, for a reward model; the score has no start yet.
    Raises:
        ModelError: it cannot be loaded; says whether it is gated, absent, offline or too large.
        ConfigError: its attention needs what this machine has not.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _check_attention(model)
    avoid_cudnn_attention()
    dtype, _ = compute_dtype(quant)
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with loading(model.name, "model.name", model.revision, passing=(torch.cuda.OutOfMemoryError,)):
        base = kind.from_pretrained(
            base_path(model),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            quantization_config=quantization_config(quant, dtype, whole=[HEAD] if scores else None),
            dtype=dtype,
            attn_implementation=str(model.attn_implementation),
            device_map={"": device()},
            **({"num_labels": 1} if scores else {}),
        )
    _check_layers(base, model)
    keep_trainable(base)
    if dense:
        dequantise_once(base)
    base.requires_grad_(False)
    base.config.use_cache = False  # generation asks for its cache itself
    return base  # type: ignore[no-any-return]


def _check_attention(model: ModelSettings) -> None:
    if model.attn_implementation is not Attention.flash_attention_2:
        return
    has_package = find_spec("flash_attn") is not None or find_spec("kernels") is not None
    if torch.cuda.is_available() and has_package:
        return
    lacking = "a GPU, and none is here" if has_package else "the package flash-attn, which is not installed"
    raise ConfigError(
        f"model.attn_implementation=flash_attention_2 needs {lacking}. Type model.attn_implementation=sdpa."
    )


def avoid_cudnn_attention() -> None:
    """Let attention be computed by torch's other kernels in this process.

    On an H100 or H200 torch takes cuDNN's first. With a mask and 64 tokens more than a multiple of 128 its backward
    gives NaN where all scores of a token are small (torch 2.11; github.com/pytorch/pytorch/issues/196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def base_shape(model: ModelSettings) -> ModelShape:
    """The base's sizes, from its config.json alone.

    Raises:
        ModelError: the config cannot be loaded, or is not of a model that is built as Llama is.
    """
    config = _config_of(model)
    if missing := set(SIZES) - config.to_dict().keys():
        raise _not_a_llama(model, config.model_type, f"its config.json has no {min(missing)}")
    return shape_from_config(config)


def check_architecture(model: ModelSettings) -> None:
    """Refuse a base that `load_base` would refuse once its weights are loaded: by its modules alone, with one layer.

    Raises:
        ModelError: the config cannot be loaded, or is not of a model that is built as Llama is.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(_config_of(model))
    config.num_hidden_layers = 1
    with loading(model.name, "model.name", model.revision), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    _check_layers(base, model)


def context_of(model: ModelSettings) -> int | None:
    """Tokens for which the base has places; None where its config does not say.

    Raises:
        ModelError: the config cannot be loaded.
    """
    config = _config_of(model)
    places = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if places and rope.get("rope_type") in ("linear", "dynamic"):  # these stretch the places that the config names
        places = int(places * rope.get("factor", 1))
    elif places and rope.get("rope_type") == "yarn":  # some configs name the places before, and some those after
        places = max(places, int(rope.get("original_max_position_embeddings", places) * rope.get("factor", 1)))
    return places


def _config_of(model: ModelSettings) -> Any:
    from transformers import AutoConfig

    with loading(model.name, "model.name", model.revision):
        return AutoConfig.from_pretrained(
            base_path(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def device() -> torch.device:
    """The GPU of this process's local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def _check_layers(base: Any, model: ModelSettings) -> None:
    if not hasattr(getattr(base, "model", None), "layers"):
        raise _not_a_llama(model, base.config.model_type, "it has no model.layers")


def _not_a_llama(model: ModelSettings, kind: str, what: str) -> ModelError:
    return ModelError(
        f"model.name={model.name} is a model of type {kind}, and not built as Llama is: {what}. Type the name of a "
        "model with Llama's architecture."
    )


def set_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation stop at the tokenizer's EOS and pad with its pad token; kept with the adapter."""
    for config in (model.config, getattr(model, "generation_config", None) or model.config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def describe(model: ModelSettings, quant: QuantSettings) -> str:
    """One line: the base, its storage and its compute type with the reason."""
    dtype, reason = compute_dtype(quant)
    stored = str(quant.type) if quant.type is not QuantType.none else "not quantised"
    double = ", double quantised" if quant.double_quant else ""
    return f"{model.name}: {stored}{double}, computes in {str(dtype).removeprefix('torch.')} ({reason})"


def _pad_token(tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> str:
    # pad = eos hides the real EOS from collators that mask by id, and a new token would resize the embedding
    own = tokenizer.pad_token if tokenizer.pad_token != tokenizer.eos_token else None
    pad = model.pad_token or own or tokenizer.unk_token
    if pad is None or pad == tokenizer.eos_token:
        raise ConfigError(
            f"No token of {model.name} can pad: it must not be the EOS {tokenizer.eos_token}. "
            "Type model.pad_token=TOKEN with a reserved token of its vocabulary."
        )
    if pad not in tokenizer.get_vocab():
        raise ConfigError(
            f"model.pad_token={pad} is not in the vocabulary of {model.name}. Leave it out, or type a token that is."
        )
    return pad
