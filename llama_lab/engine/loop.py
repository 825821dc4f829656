"""The fast way to train on a GPU: a loop that never waits for the device between two logged steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llama_lab.engine.row import Row
from llama_lab.engine.stack import Stack
from llama_lab.results import FitResult
from llama_lab.training import FitSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llama_lab.events import Listener

SHORT_RUN = 20
"""Steps up to which a run is neither compiled nor recorded: it would be over before that pays."""


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: FitSettings,
    listener: Listener,
    evaluate: Callable[[], dict[str, float]],
) -> FitResult:
    """What trainer.fit does, for models and settings that choose.unsuited_model lets through: a stack of one row.

    Raises:
        RunError: the loss is no longer finite.
    """
    row = Row(model, "default", tokenizer, train, settings, listener, evaluate)
    on_gpu = torch.cuda.is_available()
    stack = Stack(
        model,
        num_rows=1,
        rank=row.rank,
        memory=settings.memory,
        dropout=row.dropout > 0,
        paid=on_gpu and row.num_steps_left > SHORT_RUN,
        note=settings.note,
    )
    if on_gpu and row.num_steps_left <= SHORT_RUN:
        steps = row.num_steps_left
        settings.note(f"Not compiled: {steps} steps are over before that pays (from {SHORT_RUN + 1} steps on it does).")
    stack.join(row)
    while not stack.is_empty:
        stack.step()
    if row.error is not None:
        raise row.error
    assert row.result is not None
    return row.result
