"""The launcher that Hydra calls: a study's trials one by one as their slots bring them, a grid all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins import basic_launcher
from hydra.core.utils import JobReturn

TARGET = "hydra_plugins.llama_lab_launcher.StackedLauncher"
NAME = TARGET.rpartition(".")[2]


class StackedLauncherBase(basic_launcher.BasicLauncher):
    """Base of the plugin in hydra_plugins/, which Hydra makes with the keys of hydra.launcher."""

    def __init__(self, rows: Any = "auto") -> None:
        """
        Args:
            rows: hydra.launcher.rows, checked before the sweep by llama_lab.app.CheckFirst.
        """
        super().__init__()
        self.rows = rows

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, together where they share a base."""
        from llama_lab.sweep.trial import TrialTask

        if isinstance(self.task_function, TrialTask):  # one trial of a study, which knows the stacks itself
            return super().launch(job_overrides, initial_job_idx)
        from llama_lab.stacked.grid import launch_grid
        from llama_lab.stacked.rows import check_rows

        assert self.hydra_context is not None
        assert self.config is not None
        return launch_grid(self.hydra_context, self.config, job_overrides, initial_job_idx, check_rows(self.rows))
