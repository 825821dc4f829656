"""The adapter: PEFT's LoRA on the frozen base."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llama_lab.checks import check_layers
from llama_lab.choices import LoraInit
from llama_lab.config import OWN_ADAPTER, LoraSettings
from llama_lab.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_JOINED = "llama_lab_joined"
"""An attribute of a module that has the hooks of `join_whole_modules`."""


def lora_config(lora: LoraSettings, *, scores: bool = False) -> LoraConfig:
    """PEFT's own configuration of our settings; for a model that scores, its head is trained beside the adapter."""
    from peft import LoftQConfig, LoraConfig

    kwargs: dict[str, Any] = {}
    if lora.init is not LoraInit.default:
        kwargs["init_lora_weights"] = str(lora.init)
    if lora.init is LoraInit.loftq:
        kwargs["loftq_config"] = LoftQConfig(loftq_bits=4)
    return LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=lora.r,
        # other readers of adapter_config.json want a whole number where it is one
        lora_alpha=cast(int, int(lora.alpha) if lora.alpha.is_integer() else lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias=cast(Any, str(lora.bias)),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save or None,
        layers_to_transform=lora.layers_to_transform or None,
        **kwargs,
    )


def add_adapter(
    base: PreTrainedModel, lora: LoraSettings, *, seed: int, name: str = OWN_ADAPTER, scores: bool = False
) -> PeftModel:
    """The base with a trainable adapter whose start depends on `seed` alone.

    Raises:
        ConfigError: lora.init=loftq without a GPU, or PEFT refuses the settings for this base.
    """
    from peft import get_peft_model

    if lora.init is LoraInit.loftq and not torch.cuda.is_available():
        raise ConfigError("lora.init=loftq computes on a GPU, and none is here. Type lora.init=default.")
    check_layers(lora, base.config.num_hidden_layers)
    torch.manual_seed(seed)
    try:
        return get_peft_model(base, lora_config(lora, scores=scores), adapter_name=name)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"PEFT refuses these lora.* settings on this model: {' '.join(str(error).split()).rstrip('.')}. "
            "Type lora=all_linear, which suits every Llama."
        ) from error


def add_named_adapter(model: PeftModel, name: str, lora: LoraSettings, *, seed: int, empty: bool = False) -> None:
    """One more adapter on the same base, to the bit the one that `add_adapter` makes there.

    It is not the active one: `model.set_adapter(name)` makes it that.

    Args:
        empty: its parameters hold no numbers, on torch's device `meta`; they are put in behind it.
    Raises:
        ConfigError: lora.init changes the base, which others share; or PEFT refuses the settings for this base.
    """
    if lora.init in (LoraInit.pissa, LoraInit.olora, LoraInit.loftq):
        raise ConfigError(
            f"lora.init={lora.init} changes the base, on which other adapters are trained. Type lora.init=default."
        )
    check_layers(lora, model.config.num_hidden_layers)
    torch.manual_seed(seed)
    try:
        model.add_adapter(name, lora_config(lora), low_cpu_mem_usage=empty)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"PEFT refuses these lora.* settings on this model: {' '.join(str(error).split()).rstrip('.')}. "
            "Type lora=all_linear, which suits every Llama."
        ) from error


def join_whole_modules(model: PeftModel) -> None:
    """Let the modules of lora.modules_to_save, which are trained in fp32, stand between blocks that compute in bf16.

    Autocast does so in a GPU's training steps alone: not on a CPU, and not where answers are written.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values():
                if not hasattr(module, _JOINED):
                    setattr(module, _JOINED, True)
                    module.register_forward_pre_hook(_into_own_type)
                    module.register_forward_hook(partial(_into_type, dtype))


def _into_own_type(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    x = args[0]
    if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
        return None
    return (x.to(next(module.parameters()).dtype), *args[1:])


def _into_type(dtype: torch.dtype, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
    return None if torch.is_autocast_enabled(out.device.type) else out.to(dtype)


def count_params(model: PeftModel, adapter_name: str = OWN_ADAPTER) -> tuple[int, int]:
    """(trainable, all) parameters of the base and one adapter; 4-bit weights count as the numbers they stand for."""
    if model.active_adapter != adapter_name:
        model.set_adapter(adapter_name)
    trainable, total = model.get_nb_trainable_parameters()
    others = [name for name in model.peft_config if name != adapter_name]
    theirs = sum(p.numel() for key, p in model.named_parameters() if any(f".{name}." in key for name in others))
    return int(trainable), int(total) - theirs


def save_adapter(model: PeftModel, adapter_name: str, folder: Path) -> None:
    """PEFT's files of one adapter in `folder` itself, whatever its name is in the model."""
    # the embedding is never resized here, so PEFT need not compare it with the hub's
    model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=[adapter_name])
    below = folder / adapter_name  # where PEFT puts every adapter that is not called "default"
    if below.is_dir():
        for file in below.iterdir():
            file.rename(folder / file.name)
        below.rmdir()
    # PEFT's card has blanks and a path of this machine; `push` writes one that says something (take/card.py)
    (folder / "README.md").unlink(missing_ok=True)
