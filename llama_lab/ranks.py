"""Several processes that train one run together, as `accelerate launch` and `torchrun` start them.

The first does all that a run does; the others follow: they hear which run it is, load the same model and rows, and
train along. They write nothing and say nothing.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from llama_lab.config import RunConfig
from llama_lab.errors import ConfigError

PATIENCE = timedelta(hours=12)
"""The others wait so long while the first measures, or fills the cache of rows."""
Order = tuple[RunConfig, Path]
"""A run's settings and its folder."""


VARIABLES = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""What torchrun tells each process, and what holds where nobody has told."""


def check_variables() -> None:
    """Refuse variables that are no numbers, or of which only some are set. Call it before anything else asks for them.

    Where they speak of one process alone, as of torchrun --nproc-per-node 1, they are taken away: accelerate would make
    a group of it, in which a model is not what it is in a run by itself.

    Raises:
        ConfigError: names the variable.
    """
    for name in VARIABLES:
        nobody = name == "LOCAL_RANK" and os.environ.get(name) == "-1"  # torch's and accelerate's word for it
        if not nobody and not os.environ.get(name, "0").isdecimal():
            raise ConfigError(f"{name}={os.environ[name]} is no whole number from 0. {_how_to_set(name)}")
    if num_ranks() > 1 and "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={num_ranks()} says several processes, and RANK is not set. {_how_to_set()}")
    if _variable("RANK") >= num_ranks():
        raise ConfigError(f"RANK={_variable('RANK')} is none of WORLD_SIZE={num_ranks()} processes. {_how_to_set()}")
    if num_ranks() == 1:
        for name in VARIABLES:
            os.environ.pop(name, None)


def num_ranks() -> int:
    """Processes of this run; 1 where it was started by itself."""
    return max(1, _variable("WORLD_SIZE"))


def is_first() -> bool:
    """Whether this process writes the run's files; true where there is no other."""
    return _variable("RANK") == 0


def local_rank() -> int:
    """Which GPU of its machine is this process's."""
    return max(0, _variable("LOCAL_RANK"))


def check_no_sweep() -> None:
    """Call it where many runs are started.

    Raises:
        ConfigError: this is one process of several.
    """
    if num_ranks() > 1:
        raise ConfigError(
            "Several processes train one run together (accelerate launch, torchrun), and -m starts many runs. "
            "Leave one of the two out: a study gives each trial a GPU of its own."
        )


def tell(order: Order | None) -> None:
    """Let the others train this run along; None lets them go."""
    if num_ranks() > 1:
        _exchange(order)


def wait() -> None:
    """Until all are here."""
    if num_ranks() > 1:
        import torch.distributed

        torch.distributed.barrier()


def follow() -> int:
    """What the others do: train along until they are let go; the exit code."""
    while (order := _exchange(None)) is not None:
        config, folder = order
        from llama_lab.process import prepare, quiet_libraries

        prepare(config)
        from llama_lab.along import train_along

        quiet_libraries(config)
        train_along(config, folder)
    return 0


def _exchange(value: Any) -> Any:
    """What the first process says, in all of them."""
    import torch

    if not torch.distributed.is_initialized():
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(
                f"WORLD_SIZE={num_ranks()} says several processes, and {missing[0]} is not set. {_how_to_set()}"
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        # not by accelerate: it imports the hub's library, which must not be before `prepare`
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    said = [value]
    torch.distributed.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


def _variable(name: str) -> int:
    return int(os.environ.get(name, VARIABLES[name]))


def _how_to_set(name: str = "WORLD_SIZE RANK LOCAL_RANK") -> str:
    return f"torchrun and accelerate launch set such variables together; for a run by itself type `unset {name}`."
