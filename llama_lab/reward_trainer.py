"""trainer=reward: TRL's trainer of a model that scores answers; how it is run is trainer.py's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import RewardConfig, RewardTrainer

from llama_lab.arguments import shared_arguments
from llama_lab.config import EvaluateSettings
from llama_lab.data.answers import PAIRED
from llama_lab.data.splits import Split
from llama_lab.events import Listener
from llama_lab.preference_batches import Batch, PairCollator, Rows
from llama_lab.results import FitResult, Score
from llama_lab.reward_model import scores
from llama_lab.trainer import ReadyRows, adapter_kept, take_out_printers, train_with
from llama_lab.training import FitSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class ScoreTrainer:
    """TRL's trainer of a reward model, ready to train and to say how well held-out pairs are told apart."""

    trainer: Any
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    def fit(self, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]) -> FitResult:
        """Train adapter and score in place; see trainer.fit."""
        return train_with(self.trainer, settings, listener, evaluate)

    def score(
        self,
        valid: Split,
        settings: EvaluateSettings,
        metrics: list[str],
        tick: Callable[[str], None] = lambda what: None,
    ) -> Score:
        """The loss on held-out pairs, the share whose better answer scores higher, and by how much on the mean.

        `metrics` are of answers that a model writes, and this one writes none.
        """
        tick("scores of held-out answers")
        was_training = self.model.training
        self.model.eval()
        better, worse = (
            scores(self.model, self.tokenizer, valid.tokens[column], settings.batch_size)
            for column in ("input_ids", PAIRED[0])
        )
        self.model.train(was_training)
        margins = better - worse
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        loss += self.trainer.args.center_rewards_coefficient * ((better + worse) ** 2).mean()
        numbers = {"reward_accuracy": float((margins > 0).float().mean()), "reward_margin": float(margins.mean())}
        return Score(eval_loss=float(loss), metrics=numbers)


def prepare_reward_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings
) -> ScoreTrainer:
    """TRL's trainer for these settings; adapter and score are in fp32."""
    own = {"center_rewards_coefficient": settings.trainer.center_rewards_coefficient}
    arguments = shared_arguments(settings) | own | {"max_length": None, "remove_unused_columns": False}
    with adapter_kept(model):
        trainer = _Trainer(
            model=model,
            args=RewardConfig(**arguments),
            train_dataset=train,
            data_collator=_WholeAnswers(pad_token_id=tokenizer.pad_token_id, multiple_of=settings.pad_to_multiple_of),
            processing_class=tokenizer,
        )
    take_out_printers(trainer)
    return ScoreTrainer(trainer=trainer, model=model, tokenizer=tokenizer)


class _Trainer(ReadyRows, RewardTrainer):
    pass


class _WholeAnswers(PairCollator):
    """The better answers above the worse ones, (2B, T), without marks: the score is read behind all of it."""

    def __call__(self, rows: Rows) -> Batch:
        batch = super().__call__(rows)
        del batch["completion_mask"]
        return batch
