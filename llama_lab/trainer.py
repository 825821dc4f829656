"""The standard way to train: TRL's trainer, made resumable to the bit and telling its events to one listener."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from llama_lab import ranks
from llama_lab.arguments import shared_arguments
from llama_lab.checkpoints import check_written_by, last_checkpoint, step_of
from llama_lab.choices import Engine
from llama_lab.data.batches import Collator
from llama_lab.events import Listener
from llama_lab.lora import join_whole_modules
from llama_lab.loss import summed_loss
from llama_lab.results import FitResult
from llama_lab.rewards import number_of
from llama_lab.training import FitSettings, Recorder, recording

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: FitSettings,
    listener: Listener,
    evaluate: Callable[[], dict[str, float]],
) -> FitResult:
    """Train the adapter in place, from the last complete checkpoint if there is one.

    Args:
        train: columns input_ids and labels, and seq_lengths where rows are packed (data/batches.py).
        evaluate: held-out numbers of the model as it is, called every trainer.eval_steps steps.
    Raises:
        RunError: the loss is no longer finite.
    """
    check_written_by(last_checkpoint(settings.checkpoints), flat=False)
    return train_with(build_trainer(model, tokenizer, train, settings), settings, listener, evaluate)


def train_with(
    trainer: Any, settings: FitSettings, listener: Listener, evaluate: Callable[[], dict[str, float]]
) -> FitResult:
    """Run any of TRL's trainers to its end, from the last complete checkpoint if there is one; see `fit`."""
    # what was measured since the trainer was made drew random numbers, and a resumed run does not measure again
    set_seed(settings.seed)
    with recording(settings, listener, evaluate) as (start, recorder):
        step = step_of(start)
        if start and step == TrainerState.load_from_json(str(start / "trainer_state.json")).max_steps:
            # transformers would take one step more, unless this was the last one of a pass
            trainer._load_from_checkpoint(str(start))
            recorder.begin(step)
            recorder.end()
            return recorder.result(step)
        trainer.add_callback(_Teller(recorder))
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        ranks.wait()  # at its end each process looks for checkpoints in a folder that the first one then removes
    return recorder.result(trainer.state.global_step)


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: FitSettings,
) -> SFTTrainer:
    """TRL's trainer for these settings; the adapter is in fp32 and to the bit what it was."""
    with adapter_kept(model):
        trainer = (_FastTrainer if settings.engine is Engine.fast else _Trainer)(
            model=model,
            args=SFTConfig(
                **shared_arguments(settings), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            ),
            train_dataset=train,
            data_collator=Collator(pad_token_id=tokenizer.pad_token_id, multiple_of=settings.pad_to_multiple_of),
            processing_class=tokenizer,
        )
    take_out_printers(trainer)
    return trainer


@contextmanager
def adapter_kept(model: PeftModel) -> Iterator[None]:
    """Afterwards the adapter is in fp32 and to the bit what it was, and modules trained whole compute with it."""
    # TRL casts a 4-bit model's adapter to bf16, and a resumed run reloads it as fp32: then the two differ. Rounded, an
    # adapter that is trained further would also be another one, and no longer its own reference
    before = {name: param.detach().float().clone() for name, param in model.named_parameters() if param.requires_grad}
    yield
    for name, param in model.named_parameters():
        if name in before:
            param.data = before[name]
    join_whole_modules(model)


def take_out_printers(trainer: Any) -> None:
    """Leave the screen to our own progress."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _GroupedByLength(LengthGroupedSampler):
    """transformers' batches of rows of like length, which depend on seed and epoch alone.

    Its own are drawn from the global generator, whose state in a later epoch a resumed run does not have.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        """accelerate tells it at the beginning of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class TrlChanges:
    """What all our trainers change of TRL's: no model cards, and rows grouped as a resumed run groups them."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        is_grouped = type(sampler) is LengthGroupedSampler
        return _GroupedByLength(sampler, self.args.seed) if is_grouped else sampler  # type: ignore[attr-defined]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint is for going on, not for sharing."""


class ReadyRows(TrlChanges):
    """TRL's trainers of rows that are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class _Trainer(TrlChanges, SFTTrainer):
    pass


class _FastTrainer(_Trainer):
    """TRL's trainer with the same loss and without its entropy and accuracy, which are a third of a step on a CPU."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.neftune_noise_alpha is not None:  # its noise is less the longer a row is: not for rows in a row
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, learned = summed_loss(model, **inputs)
        return losses / (learned if num_items_in_batch is None else num_items_in_batch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, without walks through all modules at every step: on a CPU they are a tenth of it."""
        with _without_walks(self.model):
            return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers adds up all parameters for it at every step, and nobody reads it."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        """transformers 5.23 and later ask here; as accelerate clips where there is one process and no scaling."""
        assert self.optimizer is not None
        trained = [param for group in self.optimizer.param_groups for param in group["params"]]
        return torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm)


@contextmanager
def _without_walks(model: Any) -> Iterator[None]:
    """`train` returns at once where the model is in that mode, and `zero_grad` knows what is trained."""
    trained = [param for param in model.parameters() if param.requires_grad]
    walk = model.train
    walk()  # a base is loaded in the other mode than PEFT's model around it

    def train(mode: bool = True) -> Any:
        return model if model.training is mode else walk(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for param in trained:
            param.grad = None

    model.train, model.zero_grad = train, zero_grad
    try:
        yield
    finally:
        del model.train, model.zero_grad


TOLD = {name: name for name in ("grad_norm", "learning_rate", "epoch")} | {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "accuracy": "reward_accuracy",
    "margin": "reward_margin",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "share_of_equal_groups",
    "kl": "kl",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "share_of_clipped_completions",
}
"""What is told of a step beside its loss: TRL's name and ours."""
ONE_REWARD = re.compile(r"rewards/([^/]+)/mean")
"""TRL's name of the mean of one reward."""


class _Teller(TrainerCallback):
    """Hears TRL's events, gives checkpoints their names, and tells the listener."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.first_token = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_token = state.num_input_tokens_seen
        self.recorder.settings.trainer.check_warmup(state.max_steps)
        self.recorder.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.num_tokens = state.num_input_tokens_seen - self.first_token
        if self.recorder.wants_eval(state.global_step):
            self.recorder.measure(state.global_step)
        control.should_log |= state.global_step == state.max_steps  # a short run has a loss, too
        self.recorder.listener.stepped(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            numbers: dict[str, float] = {name: logs[key] for key, name in TOLD.items() if key in logs}
            numbers |= {number_of(found[1]): logs[key] for key in logs if (found := ONE_REWARD.fullmatch(key))}
            self.recorder.log(state.global_step, logs["loss"], {k: v for k, v in numbers.items() if v is not None})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks.wait()  # each process has a file of its own in it
        if ranks.is_first():
            self.recorder.complete(state.global_step)
            final = self.recorder.settings.checkpoints / f"checkpoint-{state.global_step}"
            self.recorder.listener.saved(state.global_step, final)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.end()
