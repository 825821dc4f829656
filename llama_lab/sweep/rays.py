"""Ray for a study: started once before the slots, and asked whether it can run a trial at all."""

from __future__ import annotations

import sys
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf

from llama_lab.errors import ConfigError

RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""What a trial asks for, and what Ray calls it on a node; memory in bytes."""
AUTO = "auto"
"""Ray's word for the cluster that runs."""


def start_ray(settings: DictConfig) -> None:
    """Connect to Ray, or start one; two threads that launch first would each start a Ray of their own.

    Args:
        settings: hydra.launcher.ray.
    Raises:
        ConfigError: no cluster runs and this machine has less than a trial asks for. A cluster may get more nodes, so
            there it is a warning.
    """
    if ray.is_initialized():
        return
    options: Any = OmegaConf.to_container(settings.init, resolve=True)
    is_cluster = True
    try:
        ray.init(**options | {"address": options.get("address") or AUTO})
    except ConnectionError as error:
        if options.get("address"):
            raise ConfigError(
                f"hydra.launcher.ray.init.address={options['address']}: {str(error).splitlines()[0]} "
                "Type hydra.launcher.ray.init.address=null for a Ray of this machine's own."
            ) from error
        is_cluster = False
        ray.init(**options)
    if lacking := _lacking(settings.remote):
        where = "the Ray cluster" if is_cluster else "this machine"
        told = (
            f"a trial asks for {lacking}, and no node of {where} has that. "
            f"Type less: {' '.join(f'hydra.launcher.ray.remote.{key}={most}' for key, most in _most().items())}"
        )
        if not is_cluster:
            ray.shutdown()
            raise ConfigError(f"hydra/launcher=ray: {told}")
        print(f"llama_lab: the trials wait for a node: {told}", file=sys.stderr)


def _lacking(remote: DictConfig) -> str:
    """What no single node has: "1 num_gpus", or nothing."""
    wanted = {key: float(remote.get(key) or 0) for key in RESOURCES}
    if any(all(has[key] >= wanted[key] for key in wanted) for has in _nodes()):
        return ""
    return " and ".join(f"{key}={value:.0f}" for key, value in wanted.items() if value)


def _most() -> dict[str, str]:
    return {key: f"{max((has[key] for has in _nodes()), default=0):.0f}" for key in RESOURCES}


def _nodes() -> list[dict[str, float]]:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{key: has.get(name, 0.0) for key, name in RESOURCES.items()} for has in alive]
