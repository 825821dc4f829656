"""Which way of computing a step is taken."""

from __future__ import annotations

import torch

from llama_lab.choices import Engine
from llama_lab.config import TrainerSettings
from llama_lab.errors import ConfigError


def engine_of(trainer: TrainerSettings) -> Engine:
    """Fast or standard, for what trainer.engine asks on this machine.

    Raises:
        ConfigError: fast on a GPU, where it does not exist yet.
    """
    if not torch.cuda.is_available():
        return Engine.standard if trainer.engine is Engine.standard else Engine.fast
    if trainer.engine is Engine.fast:
        raise ConfigError("trainer.engine=fast computes on a CPU, and here is a GPU. Type trainer.engine=auto.")
    return Engine.standard
