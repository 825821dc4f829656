"""Hydra takes plugins from this namespace only; the sweeper is llama_lab/sweep/sweeper.py.

Hydra imports this module at every start, so nothing heavy may be imported from here.
"""

from llama_lab.sweep import settings, sweeper

settings.register()


class OptunaSweeper(sweeper.StudySweeper):
    """hydra/sweeper=optuna."""
