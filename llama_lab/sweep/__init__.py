"""Studies: an Optuna search as a Hydra sweeper. Read `sweeper.py` first; a trial's way is study -> trial -> child."""
