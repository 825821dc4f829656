"""The sweeper that Hydra calls: checks the study, hands its trials to the launcher, and says what was found.

Each of `n_jobs` slots takes the next trial as soon as its own has ended. A trial is one `launch` of one job whose
number is the trial's, so folders never clash, whichever launcher runs it.
"""

from __future__ import annotations

from typing import Any

from hydra.core.utils import configure_log
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

SILENT = {
    "version": 1,
    "handlers": {"none": {"class": "logging.NullHandler"}},
    "root": {"level": "INFO", "handlers": ["none"]},
    "disable_existing_loggers": False,
}
"""Hydra's launchers say two lines a job, and the terminal belongs to the table of trials."""


class StudySweeper(Sweeper):
    """Base of the plugin in hydra_plugins/, which Hydra makes with the keys of hydra.sweeper."""

    def __init__(self, **_: Any) -> None:
        """The settings are read from the composed tree, with their types."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs; the trials do not call `task_function` but llama_lab.sweep.child."""
        self.context, self.tree = hydra_context, config

    def sweep(self, arguments: list[str]) -> float:
        """Run the study; the best value of its first objective.

        Raises:
            LlamaLabError: the study cannot be right, is hopeless, or none of its trials ended well.
        """
        # nothing of this is imported by a single run or by --help
        from llama_lab.app import check_start
        from llama_lab.sweep.design import check_design, design_of

        design = design_of(self.tree, arguments, self.context.config_loader)
        configs = check_design(design)
        check_start(configs[0])
        from llama_lab.sweep.drive import drive  # imports optuna
        from llama_lab.sweep.driver import Launch

        with read_write(self.tree), open_dict(self.tree):
            self.tree.hydra.hydra_logging = SILENT
        configure_log(self.tree.hydra.hydra_logging)
        return drive(design, Launch(tree=self.tree, context=self.context, configs=configs))
