"""What a preference trainer cannot do, told before anything is loaded. Nothing here imports torch."""

from __future__ import annotations

from llama_lab.choices import Engine, LongRows, LoraInit, LossOn, PreferenceLoss, TrainerName
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError

REFERRING = (TrainerName.dpo, TrainerName.kto)
"""Trainers that compare with a reference model, the one that training begins with."""
REWRITING = (LoraInit.pissa, LoraInit.olora, LoraInit.orthogonal, LoraInit.loftq)
"""Starts of the adapter that change the weights below it, which the reference model would share."""


def check_preferences(config: RunConfig) -> None:
    """Refuse settings that do not go with a preference trainer.

    Raises:
        ConfigError: names the two settings, and what to type instead.
    """
    t, dataset = config.trainer, config.dataset
    if t.name is TrainerName.sft:
        if config.objective in ("reward_accuracy", "reward_margin"):
            raise ConfigError(f"objective={config.objective} is measured by preference trainers. Type trainer=dpo.")
        return
    wrong = {
        "dataset.packing=true": (dataset.packing, "dataset.packing=false"),
        f"dataset.loss_on={dataset.loss_on}": (
            dataset.loss_on not in (LossOn.auto, LossOn.completion),
            "dataset.loss_on=auto: it is the answers that are compared",
        ),
        "dataset.ghost_attention=true": (dataset.ghost_attention, "dataset.ghost_attention=false"),
        "dataset.long_rows=split": (dataset.long_rows is LongRows.split, "dataset.long_rows=cut, or drop"),
        "trainer.engine=fast": (t.engine is Engine.fast, "trainer.engine=auto: TRL computes it"),
        "objective=perplexity": (config.objective == "perplexity", "objective=eval_loss, or reward_accuracy"),
        f"lora.init={config.lora.init}": (
            t.name in REFERRING and config.lora.init in REWRITING,
            "lora.init=default: this start changes the base, which is the reference model",
        ),
    }
    for setting, (is_set, instead) in wrong.items():
        if is_set:
            raise ConfigError(f"{setting} does not go with trainer={t.name}. Type {instead}.")
    needs_two = t.name is TrainerName.kto and t.loss_type is PreferenceLoss.kto
    if needs_two and t.group_by_length:
        raise ConfigError(
            "trainer.group_by_length=true does not go with trainer=kto, whose loss takes the rows in one fixed order. "
            "Type trainer.group_by_length=false, or trainer.loss_type=apo_zero_unpaired."
        )
    if needs_two and t.per_device_train_batch_size < 2:
        raise ConfigError(
            "trainer=kto compares the rows of a batch with each other's prompts and needs two of them, and "
            "trainer.per_device_train_batch_size is 1. Type 2, or trainer.loss_type=apo_zero_unpaired."
        )
