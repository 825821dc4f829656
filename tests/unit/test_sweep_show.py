"""What a study says at its end."""

import io
import math
import random
import re
from pathlib import Path

import optuna
from rich.console import Console

from llama_lab.sweep.design import Design
from llama_lab.sweep.methods import PrunerSettings, SamplerSettings
from llama_lab.sweep.rows import row_of
from llama_lab.sweep.settings import Direction, SweepSettings
from llama_lab.sweep.show import ENOUGH, show_end
from llama_lab.sweep.space import parse_space


def design(folder: Path) -> Design:
    return Design(
        settings=SweepSettings(sampler=SamplerSettings(name="random"), pruner=PrunerSettings(name="none")),
        space=parse_space({"lora.r": "choice(4,8)", "trainer.learning_rate": "tag(log,interval(1e-5,1e-3))"}, []),
        objectives=["eval_loss"],
        directions=[Direction.minimize],
        baselines=[],
        folder=folder,
        storage="",
        identity={},
        config_name="config",
        searchpath=[],
        own_folders=[],
    )


def end_of(num_trials: int, folder: Path) -> str:
    """What is printed of a study whose loss is set by the learning rate, and by the rank hardly at all."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, draw, shown = optuna.create_study(), random.Random(0), design(folder)
    for _ in range(num_trials):
        trial = study.ask()
        point = shown.space.draw(trial)
        study.tell(trial, abs(math.log10(point["trainer.learning_rate"]) + 4) + draw.random() / 100)
    text = io.StringIO()
    show_end(Console(file=text, width=160), shown, study, [row_of(trial) for trial in study.trials])
    return text.getvalue()


def test_importance_names_the_setting_that_matters_once_there_are_enough_trials(tmp_path):
    text = end_of(4 * ENOUGH, tmp_path)
    (lr,), (rank,) = (re.findall(rf"│ {name} +│ +([0-9.]+) │", text) for name in ("lr", "r"))
    assert float(lr) > 0.8 > 0.2 > float(rank)
    assert "The best trials" in text
    assert f"and {4 * ENOUGH - 10} more in trials.csv" in text
    assert "How much each setting mattered" not in end_of(ENOUGH - 1, tmp_path)
