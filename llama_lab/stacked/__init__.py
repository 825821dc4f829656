"""Stacked sweeps: points of a grid or a study that share a frozen base are trained together, each as a run of its own.

Read `hosts.py` first (the process that sweeps: which point goes where), then `host.py` (the process that holds a base
and its adapters), `turns.py` (how several runs share that process) and `shared.py` (what a run gets from it).
"""
