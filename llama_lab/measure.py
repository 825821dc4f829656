"""What a run measures of its adapter before, during and after training: held-out numbers, answers to a few prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llama_lab.choices import TrainerName
from llama_lab.config import RunConfig
from llama_lab.data.answers import asked_and_wanted, chat_of
from llama_lab.data.splits import Splits
from llama_lab.evaluate import score
from llama_lab.generate import answer
from llama_lab.own_settings import FROM_PAIRS
from llama_lab.prepared import Prepared
from llama_lab.report import Sample
from llama_lab.results import FitResult, Result, Score
from llama_lab.training import peak_memory_gib

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Measurement:
    """What is known of the model at one moment."""

    score: Score
    answers: list[str]
    """To the prompts of samples.md."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures one adapter of a model, which may hold others as well."""

    config: RunConfig
    model: PeftModel
    adapter_name: str
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    prepared: Prepared | None
    """Scores by its own loss, where the trainer is not SFT's."""

    def held_out(self) -> dict[str, float]:
        """The held-out loss, as it is logged."""
        return eval_metrics(self.score([]))

    def measure(self, metrics: list[str]) -> Measurement:
        """Held-out numbers, and answers to the prompts of samples.md."""
        config, splits = self.config, self.splits
        found = self.score(metrics)
        if config.trainer.name is TrainerName.reward:
            return Measurement(score=found, answers=[])
        one_turn = all(len(asked_and_wanted(example)[0]) == 1 for example in splits.valid.examples)
        if found.answers and one_turn and self._answers_as_scored():
            # the prompts of samples.md are the first held-out ones, and those have just been answered
            return Measurement(score=found, answers=[a.strip() for a in found.answers[: config.generation.num_prompts]])
        prompts = [[{"role": "user", "content": p}] for p in self.prompts()]
        torch.manual_seed(config.seed)  # sampled answers depend on the seed alone
        answers = answer(self.model, self.tokenizer, prompts, config.generation) if prompts else []
        return Measurement(score=found, answers=[a.strip() for a in answers])

    def score(self, metrics: list[str]) -> Score:
        """The held-out loss, and these metrics of greedy answers."""
        if self.model.active_adapter != self.adapter_name:
            self.model.set_adapter(self.adapter_name)
        valid, settings = self.splits.valid, self.config.evaluate
        if self.prepared:
            return self.prepared.score(valid, settings, metrics)
        return score(self.model, self.tokenizer, valid, settings, metrics)

    def _answers_as_scored(self) -> bool:
        """Whether samples.md asks the held-out prompts, and in the way in which answers are scored."""
        asked, limit = self.config.generation, self.config.evaluate.max_new_tokens
        is_greedy = not asked.do_sample and asked.repetition_penalty == 1
        return is_greedy and not asked.prompts and asked.max_new_tokens == limit

    def prompts(self) -> list[str]:
        """The prompts of samples.md."""
        config = self.config
        if config.trainer.name is TrainerName.reward:
            return []  # it scores answers and writes none
        if config.generation.prompts:
            return config.generation.prompts
        chats = [chat for example in self.splits.valid.examples if (chat := chat_of(example))]
        firsts = [next(m["content"] for m in chat if m["role"] == "user") for chat in chats]
        return firsts[: config.generation.num_prompts]

    def samples(self, before: Measurement | None, after: Measurement) -> list[Sample]:
        """The prompts of samples.md with both answers."""
        prompts = self.prompts()
        befores: list[str] | list[None] = before.answers if before else [None] * len(prompts)
        return [Sample(prompt=p, before=b, after=a) for p, b, a in zip(prompts, befores, after.answers, strict=True)]


def eval_metrics(found: Score) -> dict[str, float]:
    """A score by the names under which it is logged; without a loss where the rows have no answers."""
    loss = {} if math.isnan(found.eval_loss) and found.metrics else {"eval/loss": found.eval_loss}
    return loss | {f"eval/{name}": value for name, value in found.metrics.items()}


def result_of(
    config: RunConfig, num_params: tuple[int, int], before: Measurement | None, fitted: FitResult, after: Measurement
) -> Result:
    """result.json of a run that ended well.

    Args:
        num_params: trained, and in all.
    """
    trainable, total = num_params
    is_of_tokens = config.trainer.name not in FROM_PAIRS
    result = Result(
        objective=math.nan,
        eval_loss_before=before.score.eval_loss if before else None,
        eval_loss=after.score.eval_loss,
        perplexity=math.exp(min(after.score.eval_loss, 700.0)) if is_of_tokens else None,
        train_loss=fitted.train_loss,
        train_runtime_s=fitted.train_runtime_s,
        tokens_per_s=fitted.tokens_per_s,
        peak_memory_gib=peak_memory_gib(),
        num_trainable_params=trainable,
        num_params=total,
        num_steps=fitted.num_steps,
        metrics_before=before.score.metrics if before else {},
        metrics=after.score.metrics,
    )
    result.objective = result.as_json()[config.objective]
    return result
