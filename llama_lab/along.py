"""What the processes beside the first one do of its run (ranks.py)."""

from __future__ import annotations

from pathlib import Path

from llama_lab.backend import OwnBackend
from llama_lab.choices import Engine, Memory
from llama_lab.config import RunConfig
from llama_lab.data.batches import training_rows
from llama_lab.data.splits import build_splits
from llama_lab.events import Listeners
from llama_lab.model import load_tokenizer
from llama_lab.prepared import prepare
from llama_lab.rundir import RunDir
from llama_lab.training import fit_settings


def train_along(config: RunConfig, folder: Path) -> None:
    """The same training, on this process's share of the rows.

    Args:
        config: settings of the run, with the micro-batch that the first process has chosen.
    """
    tokenizer = load_tokenizer(config.model)
    splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)
    backend = OwnBackend()
    adapted = backend.adapted(config, tokenizer)
    settings = fit_settings(config, RunDir(folder), Engine.standard, Memory.balanced, lambda said: None)
    if prepared := prepare(adapted.model, tokenizer, splits, settings):
        prepared.fit(settings, Listeners(), dict)
        return
    rows = training_rows(splits.train.tokens, config.dataset)
    backend.fit(adapted, tokenizer, rows, settings, Listeners(), dict)
