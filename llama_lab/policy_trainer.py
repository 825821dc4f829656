"""trainer=grpo and rloo: TRL's trainers by the worth of the model's own answers; how they are run is trainer.py's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import RepeatSampler

from llama_lab.arguments import shared_arguments
from llama_lab.choices import TrainerName
from llama_lab.config import EvaluateSettings
from llama_lab.data.answers import asked_and_wanted
from llama_lab.data.splits import Split
from llama_lab.data.templates import Messages, encode_prompt
from llama_lab.errors import ConfigError, RunError
from llama_lab.evaluate import Answers, greedy_answers, held_out_loss
from llama_lab.events import Listener
from llama_lab.generate import whole_head_input
from llama_lab.own_settings import OWN_SETTINGS
from llama_lab.preference_batches import check_num_prompts
from llama_lab.results import FitResult, Score
from llama_lab.reward_model import load_scorer
from llama_lab.rewards import REWARD_MODEL, find_reward, number_of
from llama_lab.trainer import TrlChanges, adapter_kept, take_out_printers, train_with
from llama_lab.trainer_config import TrainerSettings
from llama_lab.training import FitSettings, not_finite

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

NOT_FINITE = ("probability tensor contains", "device-side assert")
"""What torch says of drawing from probabilities that are not finite; on a GPU it stops at once and knows no reason."""
Worth = Callable[[list[Messages], list[str], list[str]], list[float]]
"""(prompts, completions, answers) to what each completion is worth."""


@dataclass(kw_only=True)
class PolicyTrainer:
    """One of TRL's trainers that is ready to train and to say what the model's answers are worth.

    With beta above 0 the reference model is the model as it is when this is made, as in preference_trainer.py.
    """

    trainer: Any
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    worths: dict[str, Worth]
    weights: list[float]

    def fit(self, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]) -> FitResult:
        """Train the adapter in place; see trainer.fit."""
        result = train_with(self.trainer, settings, listener, evaluate)
        equal = [row["frac_reward_zero_std"] for row in self.trainer.state.log_history if "frac_reward_zero_std" in row]
        if equal and min(equal) == 1.0:
            settings.note(
                "Nothing was learned: in every group all answers were worth the same. Type a larger "
                "trainer.temperature or num_generations, or rewards that tell more answers apart (length, ...)."
            )
        return result

    def score(
        self,
        valid: Split,
        settings: EvaluateSettings,
        metrics: list[str],
        tick: Callable[[str], None] = lambda what: None,
    ) -> Score:
        """Held-out loss of the rows' answers as of trainer=sft, the mean reward of greedy ones, and the metrics."""
        tick("held-out loss")
        loss = held_out_loss(self.model, self.tokenizer, valid, settings.batch_size)
        answers = greedy_answers(self.model, self.tokenizer, valid, settings, tick)
        return Score(eval_loss=loss, metrics=self._rewards(answers) | answers.metrics(metrics), answers=answers.given)

    def _rewards(self, answers: Answers) -> dict[str, float]:
        by_name = {
            name: sum(worth(answers.prompts, answers.given, answers.wanted)) / len(answers.given)
            for name, worth in self.worths.items()
        }
        total = sum(weight * mean for weight, mean in zip(self.weights, by_name.values(), strict=True))
        return {"reward": total} | {number_of(name): mean for name, mean in by_name.items()}


def prepare_policy_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, train: Split, settings: FitSettings
) -> PolicyTrainer:
    """TRL's trainer for trainer.name; the adapter is in fp32 and to the bit what it was.

    Raises:
        DataError: there are fewer prompts than one step takes.
        LlamaLabError: a reward, or the reward model, cannot be loaded.
    """
    t = settings.trainer
    check_num_prompts(len(train.tokens), t)
    worths = {name: worth_of(name, t) for name in t.rewards or []}
    kind, arguments = KINDS[t.name]
    with adapter_kept(model):
        trainer = kind(
            model=model,
            reward_funcs=[_for_trl(name, worth) for name, worth in worths.items()],
            args=arguments(**_arguments(settings)),
            train_dataset=_prompts(train),
            processing_class=tokenizer,
        )
    take_out_printers(trainer)
    trainer.add_callback(_GradientCheck())
    weights = t.reward_weights or [1.0] * len(worths)
    return PolicyTrainer(trainer=trainer, model=model, tokenizer=tokenizer, worths=worths, weights=weights)


def worth_of(name: str, trainer: TrainerSettings) -> Worth:
    """What answers are worth by one of trainer.rewards.

    Raises:
        LlamaLabError: it cannot be loaded; or, when it is asked, it fails or gives no number.
    """
    if name == REWARD_MODEL:
        score = load_scorer(str(trainer.reward_model))
        return lambda prompts, given, wanted: score(prompts, given)
    reward = find_reward(name)

    def one(prompt: str, completion: str, answer: str) -> float:
        try:
            worth = float(reward(prompt, completion, answer))
        except (Exception, SystemExit) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
            raise ConfigError(
                f"trainer.rewards: {name} failed on the answer {completion!r:.80}: {said}. It is called with three "
                "texts, (prompt, completion, answer), and returns a number. HYDRA_FULL_ERROR=1 shows where it failed."
            ) from error
        if not math.isfinite(worth):
            raise ConfigError(
                f"trainer.rewards: {name} gives {worth} for the answer {completion!r:.80}; let it be finite."
            )
        return worth

    return lambda prompts, given, wanted: [
        one(p[-1]["content"], g, w) for p, g, w in zip(prompts, given, wanted, strict=True)
    ]


class _Ours(TrlChanges):
    """What is ours in TRL's trainers: prompts as in all training, rows in an order that a resumed run finds again."""

    def _tokenize_prompts(self, prompts: list[Messages]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [encode_prompt(prompt, self.processing_class) for prompt in prompts], None, {}  # type: ignore[attr-defined]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        try:
            with whole_head_input(trainer.model):
                return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if any(said in str(error) for said in NOT_FINITE):
                raise _not_finite("answers were drawn", trainer.state.global_step, trainer.args) from error
            raise

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        sampler.__class__ = _EpochSampler
        return sampler


class _GradientCheck(TrainerCallback):
    """Ends the run before a gradient that is not finite gets into the adapter, from which answers are drawn next."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [param.grad for param in model.parameters() if param.grad is not None]
        if gradients and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
            raise _not_finite("its gradient was computed", state.global_step, args)


def _not_finite(when: str, step: int, arguments: Any) -> RunError:
    said = f"Numbers are no longer finite: step {step + 1} ended as {when}"
    return not_finite(said, arguments.learning_rate)


class _EpochSampler(RepeatSampler):
    """TRL's sampler, whose order depends on the number of the epoch and not on how many it has seen."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass over the prompts."""
        self.generator.manual_seed((self.seed or 0) + epoch)


class _GRPO(_Ours, GRPOTrainer):
    pass


class _RLOO(_Ours, RLOOTrainer):
    pass


KINDS: dict[TrainerName, tuple[Any, Any]] = {
    TrainerName.grpo: (_GRPO, GRPOConfig),
    TrainerName.rloo: (_RLOO, RLOOConfig),
}


def _arguments(settings: FitSettings) -> dict[str, Any]:
    """What both are told; their own settings have TRL's names."""
    t = settings.trainer
    own = {key: getattr(t, key) for key in OWN_SETTINGS[t.name] if key != "rewards"}
    own |= {key: str(own[key]) for key in ("loss_type", "scale_rewards") if key in own}
    shared = {key: value for key, value in shared_arguments(settings).items() if key != "train_sampling_strategy"}
    return (
        shared
        | own
        | {
            "reward_weights": t.reward_weights,
            "disable_dropout": True,
            "include_num_input_tokens_seen": "no",  # TRL counts them itself: those of the prompts and of the answers
            "pad_to_multiple_of": settings.pad_to_multiple_of,
            "generation_kwargs": {"use_cache": True},  # training turns the model's own off
        }
    )


def _prompts(train: Split) -> Dataset:
    """Columns prompt (messages) and answer, which is empty where the rows have none."""
    from datasets import Dataset

    asked = (asked_and_wanted(example) for example in train.examples)
    return Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in asked])


def _for_trl(name: str, worth: Worth) -> Callable[..., list[float]]:
    def reward(prompts: list[Messages], completions: list[Messages], answer: list[str], **_: Any) -> list[float]:
        return worth(prompts, [turns[-1]["content"] for turns in completions], answer)

    reward.__name__ = name
    return reward
