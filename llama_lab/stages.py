"""Several runs as one command: each stage goes on with the adapter of the one before, in a folder of its own.

An experiment's `stages` names them, each with the words that make it different:

    stages:
      sft: [dataset=sample]
      dpo: [trainer=dpo, dataset=sample_preference]

Nothing here imports torch until a stage runs.
"""

from __future__ import annotations

import gc
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from llama_lab.choices import Resume
from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.continued import check_adapter, check_goes_on
from llama_lab.errors import ConfigError, LlamaLabError, RunError
from llama_lab.lock import as_plain, check_unchanged, config_of
from llama_lab.rundir import STAGES_FILE, RunDir, telling_how_to_go_on, write_json

SCHEMA = 1
"""Version of stages.json."""
NAME = re.compile(r"\w+")
NOT_OF_A_STAGE = ("hydra.", "hydra/", "+hydra", "resume=", "stages", "+stages")
"""How words begin that hold for all stages, or for none."""


@dataclass(kw_only=True)
class Stage:
    """One run of several."""

    number: int
    """From 1."""
    name: str
    words: list[str]
    """What one would type to compose it."""
    config: RunConfig

    def folder(self, of_all: Path) -> Path:
        """Where its run lies."""
        return of_all / f"{self.number}_{self.name}"


def stages_of(config: RunConfig, words: list[str]) -> list[Stage]:
    """The stages of an experiment, composed and checked; empty where it is one run.

    Args:
        words: the settings of the command line. They hold for every stage, and win over its own.
    Raises:
        LlamaLabError: what is wrong with the words of a stage, or with the settings that they compose.
    """
    check_words_of(config.stages, words)
    stages = []
    for number, (name, own) in enumerate(config.stages.items(), 1):
        kept = [word for word in words if not word.lstrip("+").startswith("stages.")]
        composed = compose_words_of(name, [*own, *kept])
        stages.append(Stage(number=number, name=name, words=[*own, *kept], config=replace(composed, stages={})))
    for before, stage in pairwise(stages):
        check_goes_on(stage.config, f"stage {stage.name}", before.config, f"stage {before.name}")
    return stages


def check_words_of(stages: Mapping[str, list[str]], words: list[str]) -> None:
    """Refuse a name that is none, and a choice that both the command line and a stage make.

    Raises:
        ConfigError: names the stage, and what to type.
    """
    groups = {word.partition("=")[0] for word in words if "." not in word.partition("=")[0]}
    for number, (name, own) in enumerate(stages.items()):
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"stages.{name}: the name becomes that of a folder. Take letters, digits and _ alone.")
        for word in own:
            if word.startswith(NOT_OF_A_STAGE):
                raise ConfigError(f"stages.{name}: {word} is nothing that a stage chooses. Leave it out there.")
            if number and word.partition("=")[0].lstrip("+") == "model.adapter":
                raise ConfigError(
                    f"stages.{name}: {word}, and a stage goes on with the adapter of the stage before it. Leave it out."
                )
        twice = sorted(groups & {word.partition("=")[0] for word in own})
        if twice:
            quoted = ",".join(f"'{word}'" for word in own)
            raise ConfigError(
                f"{twice[0]}= is chosen by the stage {name} itself. Leave it out, or type other words of the stage: "
                f'"stages.{name}=[{quoted}]"'
            )


def compose_words_of(name: str, words: list[str]) -> RunConfig:
    """The settings of one stage.

    Raises:
        ConfigError: what is wrong, and in which stage.
    """
    try:
        return compose_words(words)
    except LlamaLabError as error:
        raise ConfigError(f"stage {name}: {error}") from error


def run_stages(
    stages: list[Stage], folder: Path, group: str, run: Callable[[RunConfig, Path, list[str]], float]
) -> float:
    """Do the stages one after the other; one that has ended well is not done again. The last one's objective.

    Args:
        group: of W&B, for all of them.
        run: does one run in a folder (app.run_in).
    Raises:
        LlamaLabError: a stage failed; the command again goes on with it.
    """
    configs = [_config_in(folder, stage, before) for before, stage in zip([None, *stages], stages, strict=False)]
    _check_begun(folder, stages, configs)
    write_stages(folder, stages)
    value = float("nan")
    for stage, config in zip(stages, configs, strict=True):
        config.tracking = replace(config.tracking, group=config.tracking.group or group)
        if stage is not stages[0]:
            from llama_lab.training import forget_peak  # the first stage has imported torch

            forget_peak()
            check_adapter(config)
        print(f"\nStage {stage.number} of {len(stages)}, {stage.name}: {stage.folder(folder)}", flush=True)
        with telling_how_to_go_on(folder, STAGES_FILE):
            value = run(config, stage.folder(folder), stage.words)
        gc.collect()  # the model of a stage is held by circles of its own making
    print(f"\nAll stages: python -m llama_lab compare {shlex.quote(str(folder))}")
    return value


def _config_in(folder: Path, stage: Stage, before: Stage | None) -> RunConfig:
    """The settings of a stage in the folder of all: it resumes, and goes on with the adapter of the one before."""
    config = replace(stage.config, trainer=replace(stage.config.trainer, resume=Resume.auto))
    if before is not None:
        config.model = replace(config.model, adapter=str(before.folder(folder)))
    return config


def _check_begun(folder: Path, stages: list[Stage], configs: list[RunConfig]) -> None:
    """Refuse other settings than those that a stage has begun with, while stages.json still holds the old ones."""
    for stage, config in zip(stages, configs, strict=True):
        run_dir = RunDir(stage.folder(folder))
        if run_dir.lock.is_file():
            try:
                check_unchanged(run_dir.read_lock(), config)
            except LlamaLabError as error:
                raise ConfigError(f"stage {stage.name}: {error}") from error


def write_stages(folder: Path, stages: list[Stage]) -> None:
    """Write stages.json, from which `resume=FOLDER` goes on."""
    told = [{"name": s.name, "words": s.words, "config": as_plain(s.config)} for s in stages]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STAGES_FILE, {"schema": SCHEMA, "stages": told})


def read_stages(folder: Path) -> list[Stage]:
    """What stages.json says.

    Raises:
        RunError: it cannot be read.
    """
    file = folder / STAGES_FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["stages"]
        return [
            Stage(number=number, name=one["name"], words=one["words"], config=config_of(one))
            for number, one in enumerate(told, 1)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} cannot be read: {error!r}. Type the command of the experiment again.") from None
