"""What the tests of studies share: a lean run, a search space, and how a study is read."""

import csv
import re
import shlex
from pathlib import Path

from .conftest import TINY

LEAN = [*TINY, "tracking=none", "evaluate.before=false", "generation.num_prompts=0", "dataset.metrics=[]"]
STUDY = ["-m", "hydra/sweeper=optuna"]
RANK = "lora.r=choice(4,8)"
RATE = "trainer.learning_rate=tag(log,interval(1e-4,1e-2))"


def trials(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def folders(study: Path) -> list[int]:
    return sorted(int(path.name) for path in study.iterdir() if path.name.isdecimal())


def shown_command(stdout: str, label: str) -> list[str]:
    """The words after `python -m llama_lab` of a command that a study has printed."""
    return shlex.split(re.search(rf"^{label}:\s+python -m llama_lab (.*)$", stdout, flags=re.M)[1])
