"""The words of a trial's job."""

from __future__ import annotations

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from llama_lab.sweep.design import Design
from llama_lab.sweep.rows import settings_line, short_names
from llama_lab.sweep.study import Claim

IN_PLACE = "++hydra.job.chdir=false"
"""Of each job that shares the process of its sweep: the folder that a process is in is one for all of its threads."""


def trial_words(design: Design, found: Claim, config: DictConfig, label: str = "") -> list[str]:
    """The fixed words, the trial's point, and how it goes on and is found in W&B.

    Args:
        config: the tree without the point; what it says of W&B itself is kept.
        label: said after the trial's number, of a trial that is trained again.
    """
    names = short_names([dimension.name for dimension in design.space.dimensions])
    name = " ".join(filter(None, [f"#{found.number}", label, settings_line(found.point, names)]))
    own = ["trainer.resume=auto", IN_PLACE]
    if config.tracking.group is None:
        own.append(f"tracking.group={quoted(design.settings.study_name)}")
    if config.tracking.name is None:
        own.append(f"tracking.name={quoted(name)}")
    if config.tracking.job_type == "train":
        own.append(f"tracking.job_type={'confirm' if label else 'trial'}")
    return [*design.space.fixed, *design.space.words(found.point), *own]


def quoted(text: str) -> str:
    """A text as Hydra reads it, whatever stands in it."""
    return QuotedString(text, Quote.single).with_quotes()
