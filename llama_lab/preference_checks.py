"""What a trainer other than sft cannot do, told before anything is loaded. Nothing here imports torch."""

from __future__ import annotations

from llama_lab.choices import DataFormat, Engine, LongRows, LoraInit, LossOn, TrainerLoss, TrainerName
from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError
from llama_lab.own_settings import FROM_PAIRS, SAMPLING
from llama_lab.rewards import NEED_ANSWER
from llama_lab.trainer_config import TrainerSettings

REWRITING = (LoraInit.pissa, LoraInit.olora, LoraInit.loftq)
"""Starts of the adapter that change the weights below it, which the reference model would share."""
MEASURED_BY = {"reward_accuracy": FROM_PAIRS, "reward_margin": FROM_PAIRS, "reward": SAMPLING}
"""The trainers that measure a number of result.json."""
NOT_MEASURED_BY = dict.fromkeys(FROM_PAIRS, ("perplexity",)) | {
    TrainerName.reward: ("perplexity", "exact_match", "composes")  # it writes no answers
}
"""The numbers of other trainers that these do not have."""


def measuring(name: str) -> tuple[TrainerName, ...]:
    """The trainers that measure a number of result.json."""
    return MEASURED_BY.get(name) or tuple(t for t in TrainerName if name not in NOT_MEASURED_BY.get(t, ()))


def refers(trainer: TrainerSettings) -> bool:
    """Whether the trainer compares with a reference model, the one that training begins with."""
    return trainer.name in (TrainerName.dpo, TrainerName.kto) or (trainer.name in SAMPLING and bool(trainer.beta))


def check_preferences(config: RunConfig) -> None:
    """Refuse settings that do not go with a trainer other than sft.

    Raises:
        ConfigError: names the two settings, and what to type instead.
    """
    t, dataset = config.trainer, config.dataset
    trainers = MEASURED_BY.get(config.objective, (t.name,))
    if t.name not in trainers:
        raise ConfigError(
            f"objective={config.objective} is not measured by trainer={t.name}. Type trainer={'|'.join(trainers)}."
        )
    if t.name is TrainerName.sft:
        return
    wrong = {
        "dataset.packing=true": (dataset.packing, "dataset.packing=false"),
        f"dataset.loss_on={dataset.loss_on}": (
            dataset.loss_on not in (LossOn.auto, LossOn.completion),
            "dataset.loss_on=auto: it is the answers that are compared",
        ),
        "dataset.ghost_attention=true": (dataset.ghost_attention, "dataset.ghost_attention=false"),
        "dataset.long_rows=split": (dataset.long_rows is LongRows.split, "dataset.long_rows=cut, or drop"),
        "dataset.format=text": (dataset.format is DataFormat.text, "a format that has prompts"),
        "trainer.engine=fast": (t.engine is Engine.fast, "trainer.engine=auto: TRL computes it"),
        f"objective={config.objective}": (
            config.objective in NOT_MEASURED_BY.get(t.name, ()),
            "objective=reward_accuracy, or eval_loss",
        ),
        f"lora.init={config.lora.init}": (
            refers(t) and config.lora.init in REWRITING,
            "lora.init=default: this start changes the base, which is the reference model",
        ),
    }
    for setting, (is_set, instead) in wrong.items():
        if is_set:
            raise ConfigError(f"{setting} does not go with trainer={t.name}. Type {instead}.")
    _check_kto(t)


def check_unanswered(config: RunConfig, form: DataFormat) -> None:
    """Refuse what compares with the answers of the rows where these are prompts alone.

    Raises:
        ConfigError: names the reward and the column that is missing, and all the words that work.
    """
    if form is not DataFormat.prompt or config.trainer.name not in SAMPLING:
        return
    asking = _asking_for_answers(config)
    if asking:
        dataset = config.dataset
        raise ConfigError(
            f"{', '.join(asking)}: needs the answer of a row, and {dataset.path or dataset.file or dataset.name} holds "
            f"prompts alone, without a column {dataset.columns.completion}. Type {' '.join(asking.values())}, or "
            "dataset.columns.completion=COLUMN with the answers."
        )


def _asking_for_answers(config: RunConfig) -> dict[str, str]:
    """What compares with the rows' answers, and what to type instead."""
    t, metrics, found = config.trainer, config.dataset.metrics, {}
    rewards = t.rewards or []
    asking = [name for name in rewards if name in NEED_ANSWER]
    kept = [name for name in rewards if name not in asking]
    if asking:
        instead = f"trainer.rewards=[{','.join(kept) or 'package.module:function'}]"
        if t.reward_weights is not None:
            weights = [f"{w:g}" for name, w in zip(rewards, t.reward_weights, strict=True) if name in kept]
            instead += f" trainer.reward_weights=[{','.join(weights) or '1'}]"
        found[f"trainer.rewards={','.join(asking)}"] = instead
    if "exact_match" in metrics:
        rest = ",".join(name for name in metrics if name != "exact_match")
        found["dataset.metrics=exact_match"] = f"dataset.metrics=[{rest}]"
    if config.objective in ("perplexity", "exact_match"):
        found[f"objective={config.objective}"] = "objective=reward"
    return found


def _check_kto(t: TrainerSettings) -> None:
    needs_two = t.name is TrainerName.kto and t.loss_type is TrainerLoss.kto
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
