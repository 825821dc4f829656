"""Where a run's base comes from and who trains its adapter: a base and a loop of its own, or others' (stacked/)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from llama_lab.choices import Attention, Engine, Memory, TrainerName
from llama_lab.config import OWN_ADAPTER, RunConfig
from llama_lab.continued import continue_adapter, take_weights, writes_answers
from llama_lab.data.audit import audit
from llama_lab.data.findings import Finding
from llama_lab.data.splits import Splits, build_splits
from llama_lab.engine.choose import choose_for, fit_of
from llama_lab.engine.install import speed_up
from llama_lab.errors import ConfigError
from llama_lab.lora import add_adapter
from llama_lab.micro_batch import memory_level
from llama_lab.model import base_shape, load_base, load_tokenizer, set_special_tokens
from llama_lab.results import FitResult
from llama_lab.reward_model import prepare_head

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llama_lab.events import Listener
    from llama_lab.training import FitSettings


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A base with the run's adapter, and the engine that trains it."""

    model: PeftModel
    adapter_name: str
    engine: Engine
    note: str | None = None
    """One line that says why this engine, where a user would ask."""


LoadedRows = tuple["PreTrainedTokenizerBase", Splits, list[Finding]]
"""The tokenizer, the rows as it reads them, and what their checks found."""


class Backend(Protocol):
    """What of a run depends on whether it shares its base."""

    def rows(self, config: RunConfig) -> LoadedRows:
        """Rows to train on and to measure with; runs that share them only read.

        Raises:
            LlamaLabError: tokenizer or rows cannot be loaded.
        """

    def adapted(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Adapted:
        """The base with the run's own adapter, ready to be trained.

        Raises:
            LlamaLabError: the base cannot be loaded, or the adapter does not go with it.
        """

    def memory(self, config: RunConfig, adapted: Adapted, longest: int) -> tuple[Memory, str | None]:
        """What the fast engine keeps, and one line that says why.

        Args:
            longest: tokens of the longest row.
        """

    def fit(
        self,
        adapted: Adapted,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        settings: FitSettings,
        listener: Listener,
        evaluate: Callable[[], dict[str, float]],
    ) -> FitResult:
        """Train the adapter; see trainer.fit."""


class OwnBackend:
    """A run that has its base for itself."""

    def rows(self, config: RunConfig) -> LoadedRows:
        """Loaded and checked."""
        return load_rows(config)

    def adapted(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Adapted:
        """A base that is loaded for this run."""
        model = _adapted_base(config, tokenizer)
        choice = choose_for(config, model)
        if choice.speeds_up_model:
            speed_up(model)
        return Adapted(model=model, adapter_name=OWN_ADAPTER, engine=choice.engine, note=choice.note)

    def memory(self, config: RunConfig, adapted: Adapted, longest: int) -> tuple[Memory, str | None]:
        """The fastest level that fits on this GPU, or as asked for; elsewhere there is nothing to choose."""
        if adapted.engine is Engine.standard or not torch.cuda.is_available():
            return Memory.balanced, None
        return memory_level(config, base_shape(config.model), longest)

    def fit(
        self,
        adapted: Adapted,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        settings: FitSettings,
        listener: Listener,
        evaluate: Callable[[], dict[str, float]],
    ) -> FitResult:
        """By the engine's own loop, or TRL's trainer."""
        return fit_of(adapted.engine)(adapted.model, tokenizer, train, settings, listener, evaluate)


def load_rows(config: RunConfig) -> LoadedRows:
    """By the settings of model and dataset, trainer.name and the seed: where these are the same, so is all of it."""
    tokenizer = load_tokenizer(config.model)
    splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)
    return tokenizer, splits, audit(splits, tokenizer, config.dataset, base_shape(config.model).vocab_size)


def _adapted_base(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """The base with the adapter that training begins with."""
    if config.model.attn_implementation is Attention.flex_attention and not torch.cuda.is_available():
        raise ConfigError(
            "model.attn_implementation=flex_attention trains on a GPU alone, and none is here. "
            "Type model.attn_implementation=sdpa."
        )
    scores, start = config.trainer.name is TrainerName.reward, config.model.adapter
    base = load_base(config.model, config.quant, dense=config.trainer.engine is not Engine.standard, scores=scores)
    set_special_tokens(base, tokenizer)
    if scores:
        prepare_head(base, config.seed)
    if start is not None and not (scores and writes_answers(start)):
        return continue_adapter(base, start)
    model = add_adapter(base, config.lora, seed=config.seed, scores=scores)
    if start is not None:
        take_weights(model, start)
    return model
