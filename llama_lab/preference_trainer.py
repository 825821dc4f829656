"""Learning from preferences: TRL's trainers for our settings and tokens; how they are run is trainer.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from llama_lab.arguments import shared_arguments
from llama_lab.choices import TrainerLoss, TrainerName
from llama_lab.config import EvaluateSettings
from llama_lab.data.splits import Split
from llama_lab.evaluate import answer_metrics
from llama_lab.events import Listener
from llama_lab.own_settings import OWN_SETTINGS
from llama_lab.preference_batches import PairCollator, SideCollator, SingleCollator, single_answers
from llama_lab.preference_score import rewards_of
from llama_lab.results import FitResult, Score
from llama_lab.trainer import ReadyRows, adapter_kept, take_out_printers, train_with
from llama_lab.training import FitSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class PreferenceTrainer:
    """One of TRL's trainers that is ready to train and to say what the held-out rows cost.

    The reference model of DPO and KTO is the model as it is when this is made: the adapter that training begins with is
    kept beside the trained one, frozen, and PEFT switches between them, so there is one base in memory.
    """

    trainer: Any
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase

    def fit(self, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]) -> FitResult:
        """Train the adapter in place; see trainer.fit."""
        return train_with(self.trainer, settings, listener, evaluate)

    def score(
        self,
        valid: Split,
        settings: EvaluateSettings,
        metrics: list[str],
        tick: Callable[[str], None] = lambda what: None,
    ) -> Score:
        """The trainer's own loss on held-out rows, reward accuracy and margin, and the data set's own metrics."""
        tick("held-out loss and rewards")
        was_training = self.model.training
        self.model.eval()
        loss, rewards = self._loss(valid, settings.batch_size), self._rewards(valid, settings.batch_size)
        self.model.train(was_training)
        found, answers = answer_metrics(self.model, self.tokenizer, valid, settings, metrics, tick)
        return Score(eval_loss=loss, metrics=rewards | found, answers=answers)

    @torch.no_grad()
    def _loss(self, valid: Split, batch_size: int) -> float:
        rows, total = _rows_for(self.trainer, valid.tokens), 0.0
        if isinstance(self.trainer, KTOTrainer):
            batch_size = max(2, batch_size)
        for start in range(0, len(rows), batch_size):
            some = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {name: value.to(self.model.device) for name, value in self.trainer.data_collator(some).items()}
            with self.trainer.compute_loss_context_manager(), _alone(self.trainer.accelerator):
                total += self.trainer.compute_loss(self.model, batch).item() * len(some)
        return total / len(rows)

    def _rewards(self, valid: Split, batch_size: int) -> dict[str, float]:
        beta, refers = self.trainer.beta, isinstance(self.trainer, DPOTrainer | KTOTrainer)
        return rewards_of(self.model, self.tokenizer, valid.tokens, beta=beta, refers=refers, batch_size=batch_size)


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Nothing is gathered from other processes: the first one alone measures (ranks.py)."""
    accelerator.gather = accelerator.gather_for_metrics = accelerator.reduce = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics, accelerator.reduce


def prepare_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings
) -> PreferenceTrainer:
    """TRL's trainer for trainer.name; the adapter is in fp32 and to the bit what it was."""
    with adapter_kept(model):
        trainer = MAKERS[settings.trainer.name](model, tokenizer, train, settings)
    take_out_printers(trainer)
    return PreferenceTrainer(trainer=trainer, model=model, tokenizer=tokenizer)


class _DPO(ReadyRows, DPOTrainer):
    pass


class _KTO(ReadyRows, KTOTrainer):
    pass


def _dpo(model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings) -> Any:
    return _DPO(
        model=model,
        args=DPOConfig(**_arguments(settings) | {"loss_type": [str(settings.trainer.loss_type)]}),
        train_dataset=train,
        data_collator=PairCollator(**_padding(tokenizer, settings)),
        processing_class=tokenizer,
    )


def _kto(model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings) -> Any:
    with_kl = settings.trainer.loss_type is TrainerLoss.kto
    arguments, rows = _arguments(settings), single_answers(train)
    if with_kl:  # TRL then takes the rows in their order, the same in every epoch, so it is we who mix them
        arguments, rows = arguments | {"train_sampling_strategy": "sequential"}, rows.shuffle(seed=settings.seed)
    return _KTO(
        model=model,
        args=KTOConfig(**arguments | {"loss_type": str(settings.trainer.loss_type)}),
        train_dataset=rows,
        data_collator=SingleCollator(**_padding(tokenizer, settings), with_kl=with_kl),
        processing_class=tokenizer,
    )


def _orpo(model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # TRL warns of what is experimental when it is imported

    class ORPO(ReadyRows, ORPOTrainer):
        def tokenize_row(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """ORPO's way to prepare rows: no column is added."""
            return {}

    longest = max(map(len, train["input_ids"]))  # rows are cut already; null would mean 512 to it
    return ORPO(
        model=model,
        args=ORPOConfig(**_arguments(settings) | {"max_length": longest}),
        train_dataset=train,
        data_collator=SideCollator(**_padding(tokenizer, settings)),
        processing_class=tokenizer,
    )


MAKERS: dict[TrainerName, Callable[..., Any]] = {
    TrainerName.dpo: _dpo,
    TrainerName.kto: _kto,
    TrainerName.orpo: _orpo,
}


def _arguments(settings: FitSettings) -> dict[str, Any]:
    """What all of these trainers are told; their own settings have TRL's names."""
    own = {key: getattr(settings.trainer, key) for key in OWN_SETTINGS[settings.trainer.name]}
    return shared_arguments(settings) | own | {"max_length": None, "remove_unused_columns": False}


def _padding(tokenizer: PreTrainedTokenizerBase, settings: FitSettings) -> dict[str, Any]:
    return {"pad_token_id": tokenizer.pad_token_id, "multiple_of": settings.pad_to_multiple_of}


def _rows_for(trainer: Any, tokens: Dataset) -> Dataset:
    return single_answers(tokens) if isinstance(trainer, KTOTrainer) else tokens
