"""Hydra takes plugins from this namespace only; the launcher is llama_lab/stacked/launcher.py.

Hydra imports this module at every start, so nothing heavy may be imported from here.
"""

from llama_lab.stacked import launcher


class StackedLauncher(launcher.StackedLauncherBase):
    """hydra/launcher=stacked."""
