"""Which way of computing a step is taken, and why."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import nn

from llama_lab.choices import Engine, TrainerName
from llama_lab.config import RunConfig
from llama_lab.engine.frozen import base_of
from llama_lab.engine.network import projections_of
from llama_lab.engine.suits import unsuited
from llama_lab.errors import ConfigError
from llama_lab.ranks import num_ranks
from llama_lab.results import FitResult


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An engine, and one line that says why where a GPU user would ask."""

    engine: Engine
    note: str | None = None

    @property
    def speeds_up_model(self) -> bool:
        """On a CPU the loaded model itself computes with fewer operations, its answers included (install.py)."""
        return self.engine is Engine.fast and not torch.cuda.is_available()


def choose(config: RunConfig) -> Choice:
    """Fast or standard, for what trainer.engine asks on this machine.

    Raises:
        ConfigError: trainer.engine=fast with a setting that it does not compute.
    """
    if config.trainer.engine is Engine.standard:
        return Choice(engine=Engine.standard)
    if config.trainer.name is not TrainerName.sft:  # checks.py has refused trainer.engine=fast
        return Choice(engine=Engine.standard)
    if num_ranks() == 1 and not torch.cuda.is_available():
        return Choice(engine=Engine.fast)
    return _settled(config, unsuited_machine() or unsuited(config))


def choose_for(config: RunConfig, model: Any) -> Choice:
    """The same once the model is known: the fast engine of a GPU computes transformers' Llama with plain LoRA."""
    before = choose(config)
    if before.engine is Engine.standard or not torch.cuda.is_available():
        return before
    return _settled(config, unsuited_model(model))


def fit_of(engine: Engine) -> Callable[..., FitResult]:
    """The way to train: engine/loop.py where the fast engine has a GPU, else TRL's trainer (trainer.py)."""
    if engine is Engine.fast and torch.cuda.is_available():
        from llama_lab.engine import loop

        return loop.fit
    from llama_lab import trainer

    return trainer.fit


def unsuited_model(model: Any) -> str | None:
    """What of a PEFT model the fast engine does not compute; None where it does all."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    causal = model.get_base_model()
    if type(causal) is not LlamaForCausalLM:
        return f"a model of the class {type(causal).__name__}"
    if type(causal.lm_head) is not nn.Linear or causal.lm_head.bias is not None:
        return "an lm_head that is more than one matrix"
    if causal.config.attention_dropout or causal.config.hidden_act != "silu":
        return "attention dropout or another activation than SiLU"
    # transformers looks at the longest row of each micro-batch, for which it waits: no recording holds that
    if (kind := causal.model.rotary_emb.rope_type) in ("dynamic", "longrope"):
        return f"positions that are turned by the longest row (rope_type={kind})"
    groups = [group for layer in causal.model.layers for group in projections_of(layer)]
    if any(base_of(layer).bias is not None for group in groups for layer in group):
        return "linear layers with biases"
    adapted = [[layer for layer in group if layer is not base_of(layer)] for group in groups]
    if not any(adapted) or not all(_is_uniform(layers, name) for layers in adapted for name in model.peft_config):
        return "adapters that are more than one plain LoRA of one rank"
    return None


def _is_uniform(adapted: list[Any], name: str) -> bool:
    """Layers of one input have plain LoRA, of one rank and scale."""
    own = [layer for layer in adapted if name in layer.lora_A]
    if any(name in layer.lora_variant for layer in own):
        return False
    return len({layer.r[name] for layer in own}) <= 1 and len({layer.scaling[name] for layer in own}) <= 1


def _settled(config: RunConfig, reason: str | None) -> Choice:
    if reason is None:
        return Choice(engine=Engine.fast)
    if config.trainer.engine is Engine.fast:
        where = " on a GPU" if torch.cuda.is_available() else ""
        raise ConfigError(
            f"trainer.engine=fast does not compute {reason}{where}. Type trainer.engine=auto: TRL then computes it."
        )
    return Choice(
        engine=Engine.standard, note=f"Engine: standard (TRL), because the fast one does not compute {reason}"
    )


def unsuited_machine() -> str | None:
    """What this machine has not that the fast engine of a GPU needs; None where it has all."""
    if num_ranks() > 1:
        return "several processes"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "a GPU without bf16"
    return lacking_for_triton()


def lacking_for_triton() -> str | None:
    """What is not here of what Triton needs to compile the kernels of the fast engine; None where all is."""
    if find_spec("triton") is None:
        return "anything without Triton (python -m pip install triton)"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "anything without a C compiler, which Triton asks for (install gcc, or let CC name one)"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks on Debian
    headers = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if not headers.exists() and not (os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")):
        return f"anything without {headers}, which Triton asks for (install python3-dev, or your system's name for it)"
    return None
