"""The settings that only some trainers have: which, and in what range. Nothing here imports torch."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING

from llama_lab.choices import TrainerLoss, TrainerName
from llama_lab.errors import ConfigError, check_range

if TYPE_CHECKING:
    from llama_lab.trainer_config import TrainerSettings

FROM_PAIRS = (TrainerName.dpo, TrainerName.kto, TrainerName.orpo, TrainerName.reward)
"""Trainers whose rows are preferences; the others' have one answer."""
SAMPLING = (TrainerName.grpo, TrainerName.rloo)
"""Trainers that learn from answers of the model's own."""

_SAMPLING = ("beta", "rewards", "num_generations", "max_completion_length", "temperature", "epsilon")
OWN_SETTINGS: dict[TrainerName, tuple[str, ...]] = {
    TrainerName.sft: (),
    TrainerName.dpo: ("beta", "loss_type", "label_smoothing"),
    TrainerName.kto: ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    TrainerName.orpo: ("beta",),
    TrainerName.reward: ("center_rewards_coefficient",),
    TrainerName.grpo: (*_SAMPLING, "loss_type", "scale_rewards"),
    TrainerName.rloo: (*_SAMPLING, "normalize_advantages"),
}
"""The settings that only some trainers have, by trainer; null in the others."""
MAY_BE_NULL = dict.fromkeys(SAMPLING, ("reward_weights", "reward_model"))
"""Further settings of some trainers, that may also be null there."""

_KTO_LOSSES = (TrainerLoss.kto, TrainerLoss.apo_zero_unpaired)
_GRPO_LOSSES = (TrainerLoss.grpo, TrainerLoss.bnpo, TrainerLoss.dr_grpo, TrainerLoss.dapo)
LOSSES: dict[TrainerName, tuple[TrainerLoss, ...]] = {
    TrainerName.dpo: tuple(loss for loss in TrainerLoss if loss not in (*_KTO_LOSSES, *_GRPO_LOSSES)),
    TrainerName.kto: _KTO_LOSSES,
    TrainerName.grpo: _GRPO_LOSSES,
}


def check_own(trainer: TrainerSettings) -> None:
    """Refuse a setting of another trainer, one that is missing, and one out of its range.

    Raises:
        ConfigError: names the setting, and the trainer or the value to type.
    """
    _check_keys(trainer)
    name, beta, smoothing = trainer.name, trainer.beta, trainer.label_smoothing
    if name in SAMPLING:
        check_range(beta is not None and 0 <= beta < inf, "trainer.beta", beta, "type 0, or a positive number")
    else:
        check_range(beta is None or 0 < beta < inf, "trainer.beta", beta, "type a positive number")
    check_range(smoothing is None or 0 <= smoothing < 0.5, "trainer.label_smoothing", smoothing, "type 0 up to 0.5")
    for key in ("desirable_weight", "undesirable_weight", "temperature", "epsilon"):
        value = getattr(trainer, key)
        check_range(value is None or 0 < value < inf, f"trainer.{key}", value, "type a positive number")
    center = trainer.center_rewards_coefficient
    check_range(center is None or 0 <= center < inf, "trainer.center_rewards_coefficient", center, "type 0 or more")
    loss = trainer.loss_type
    if loss is not None and loss not in LOSSES[name]:
        raise ConfigError(f"trainer.loss_type={loss} is no loss of trainer={name}. It has: {', '.join(LOSSES[name])}.")
    if loss is TrainerLoss.exo_pair and not smoothing:
        raise ConfigError("trainer.loss_type=exo_pair needs trainer.label_smoothing above 0. Type 1e-3, as its paper.")
    if name in SAMPLING:
        _check_groups(trainer)


def _check_keys(trainer: TrainerSettings) -> None:
    name, own = trainer.name, OWN_SETTINGS[trainer.name]
    known = {of: (*keys, *MAY_BE_NULL.get(of, ())) for of, keys in OWN_SETTINGS.items()}
    for key in dict.fromkeys(key for keys in known.values() for key in keys):
        value = getattr(trainer, key)
        if value is not None and key not in known[name]:
            having = "|".join(other for other, keys in known.items() if key in keys)
            raise ConfigError(f"trainer.{key}={value} is no setting of trainer={name}. Type trainer={having} as well.")
        if value is None and key in own:
            raise ConfigError(f"trainer.{key} has no value. Type trainer={name}, whose file has all of its settings.")


def _check_groups(trainer: TrainerSettings) -> None:
    """The answers of a step are whole groups of num_generations, and each reward has its weight."""
    size, effective = trainer.num_generations or 0, trainer.effective_batch_size
    check_range(size >= 2, "trainer.num_generations", size, "type at least 2, since answers are compared")
    longest = trainer.max_completion_length or 0
    check_range(longest >= 1, "trainer.max_completion_length", longest, "type at least 1")
    if effective % size:
        fitting = [str(n) for n in range(2, effective + 1) if effective % n == 0]
        raise ConfigError(
            f"trainer.num_generations={size} does not divide the {effective} answers of a step "
            f"(per_device_train_batch_size x gradient_accumulation_steps). Type trainer.per_device_train_batch_size="
            f"{size}" + (f", or trainer.num_generations={'|'.join(fitting)}." if fitting else ".")
        )
    if trainer.group_by_length:
        raise ConfigError(
            f"trainer.group_by_length=true does not go with trainer={trainer.name}, whose answers are not there yet. "
            "Type trainer.group_by_length=false."
        )
    weights, rewards = trainer.reward_weights, trainer.rewards or []
    if weights is not None and len(weights) != len(rewards):
        raise ConfigError(
            f"trainer.reward_weights has {len(weights)} numbers, and trainer.rewards names {len(rewards)}: "
            f"{', '.join(rewards)}. Type one number for each."
        )
    finite = all(isfinite(weight) for weight in weights or [])
    check_range(finite, "trainer.reward_weights", weights, "type a finite number for each reward")
