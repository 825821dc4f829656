"""Which points can be trained together on one base. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from llama_lab.choices import Engine, LoraInit, Tracker
from llama_lab.config import RunConfig
from llama_lab.engine.suits import unsuited
from llama_lab.lock import as_plain

KEEPS_BASE = (LoraInit.default, LoraInit.gaussian, LoraInit.orthogonal)
"""How an adapter can begin without changing the base, which others share."""
OWN_OF_MODEL = ("adapter", "learning_rate", "preference_learning_rate")
"""Settings of the model that each row of a stack has for itself."""
OWN_OF_DATASET = ("metrics",)
SHARED_BY_TRAINER = ("per_device_train_batch_size", "micro_batch_size", "gradient_checkpointing", "memory", "bf16")
ONE_A_PROCESS = (Tracker.mlflow, Tracker.trackio)
"""Trackers that know one active run a process."""
SHARED_BY_LORA = ("target_modules", "layers_to_transform")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all rows of a stack have in common; points of equal kinds go into one stack."""

    shared: str
    """The common settings, as JSON."""
    alone: str | None = None
    """The setting for which a point is trained by itself; None where it can go into a stack."""

    @property
    def base(self) -> str:
        """The base in a few words."""
        found = json.loads(self.shared)
        quant = found["quant"]["type"]
        return f"{found['model']['name']}, {quant if quant != 'none' else 'not quantised'}"


def kind_of(config: RunConfig) -> Kind:
    """The kind of a point."""
    tree = as_plain(config)
    shared = {
        "model": {key: value for key, value in tree["model"].items() if key not in OWN_OF_MODEL},
        "quant": tree["quant"],
        "dataset": {key: value for key, value in tree["dataset"].items() if key not in OWN_OF_DATASET},
        "trainer": {key: tree["trainer"][key] for key in SHARED_BY_TRAINER},
        "lora": {key: tree["lora"][key] for key in SHARED_BY_LORA},
    }
    return Kind(shared=json.dumps(shared, sort_keys=True), alone=why_alone(config))


def why_alone(config: RunConfig) -> str | None:
    """The setting that a stack does not take; None where it takes all."""
    if config.trainer.engine is Engine.standard:
        return "trainer.engine=standard"
    if config.trainer.micro_batch_size == "auto":
        return "trainer.micro_batch_size=auto"
    if config.lora.init not in KEEPS_BASE:
        return f"lora.init={config.lora.init}"
    if config.tracking.backend in ONE_A_PROCESS:
        return f"tracking.backend={config.tracking.backend}"
    return unsuited(config)
