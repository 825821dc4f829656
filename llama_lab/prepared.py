"""Which of TRL's trainers beside SFT's a run takes; each is ready once model and rows are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llama_lab.choices import TrainerName
from llama_lab.config import EvaluateSettings
from llama_lab.data.splits import Split, Splits
from llama_lab.events import Listener
from llama_lab.own_settings import SAMPLING
from llama_lab.results import FitResult, Score
from llama_lab.training import FitSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Prepared(Protocol):
    """A trainer with its model."""

    def fit(self, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]) -> FitResult:
        """Train in place, from the last complete checkpoint if there is one; see trainer.fit."""

    def score(
        self,
        valid: Split,
        settings: EvaluateSettings,
        metrics: list[str],
        tick: Callable[[str], None] = lambda what: None,
    ) -> Score:
        """What the held-out rows say of the model as it is."""


def prepare(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, splits: Splits, settings: FitSettings
) -> Prepared | None:
    """The trainer of trainer.name; None for sft, whose model fit_of (engine/choose.py) trains."""
    name = settings.trainer.name
    if name is TrainerName.sft:
        return None
    if name in SAMPLING:
        from llama_lab.policy_trainer import prepare_policy_trainer

        return prepare_policy_trainer(model, tokenizer, splits.train, settings)
    if name is TrainerName.reward:
        from llama_lab.reward_trainer import prepare_reward_trainer

        return prepare_reward_trainer(model, tokenizer, splits.train.tokens, settings)
    from llama_lab.preference_trainer import prepare_trainer

    return prepare_trainer(model, tokenizer, splits.train.tokens, settings)
