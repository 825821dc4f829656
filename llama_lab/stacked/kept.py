"""What the runs of a process need alike: rows, and the numbers that adapters begin with, drawn once.

PEFT draws each matrix twice, on the CPU: half a second to two for an adapter of a 7B, in which its stack stands still.
The trials of a study mostly share their seed, so that adapters of one rank begin with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_lab.backend import LoadedRows, load_rows
from llama_lab.choices import Bias, LoraInit
from llama_lab.config import RunConfig
from llama_lab.lora import add_named_adapter
from llama_lab.quant import compute_dtype

if TYPE_CHECKING:
    from peft import PeftModel

MAX_STARTS = 4
"""Starts in memory: of rank 64 on all linear layers of a 7B each takes 0.6 GiB."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """An adapter before its training."""

    weights: dict[str, Tensor]
    """On the CPU, by the parameter's name without the adapter's."""
    torch_state: Tensor
    """Of the random numbers on the CPU, once all are drawn."""

    @classmethod
    def of(cls, model: PeftModel, name: str) -> Start:
        """Of the adapter `name`, which has just been made."""
        weights = {key: param.detach().to("cpu", copy=True) for key, param in _parameters(model, name).items()}
        return cls(weights=weights, torch_state=torch.get_rng_state())

    def put(self, model: PeftModel, name: str) -> None:
        """Give these numbers to the adapter `name`, which has none yet."""
        for key, param in _parameters(model, name).items():
            path, _, attribute = key.partition(_WITHIN)
            own = self.weights[key].to(model.device, param.dtype, copy=True)  # what is trained from here on is a copy
            own = nn.Parameter(own, requires_grad=param.requires_grad)
            setattr(model.get_submodule(f"{path}.{name}"), attribute, own)
        torch.set_rng_state(self.torch_state)


class Kept:
    """Of the runs that there have been, for those that come; also where these have another base."""

    def __init__(self) -> None:
        """None yet."""
        self._starts: dict[str, Start] = {}
        self._rows: tuple[Any, LoadedRows] | None = None

    def rows(self, config: RunConfig) -> LoadedRows:
        """Those of the run before, where this one trains on the same."""
        wanted = (config.model, config.dataset, config.trainer.name, config.seed)
        if self._rows is None or self._rows[0] != wanted:
            self._rows = wanted, load_rows(config)
        return self._rows[1]

    def remember(self, model: PeftModel, name: str, config: RunConfig) -> None:
        """What an adapter, which has just been made, begins with."""
        if (key := _key(config)) is not None:
            self._starts[key] = Start.of(model, name)
            while len(self._starts) > MAX_STARTS:
                del self._starts[next(iter(self._starts))]

    def add_adapter(self, model: PeftModel, name: str, config: RunConfig) -> None:
        """One more adapter, to the bit as of add_named_adapter, which says what it raises."""
        key = _key(config)
        if key not in self._starts:
            add_named_adapter(model, name, config.lora, seed=config.seed)
            self.remember(model, name, config)
            return
        add_named_adapter(model, name, config.lora, seed=config.seed, empty=True)
        start = self._starts.pop(key)
        start.put(model, name)
        self._starts[key] = start  # the last used one is the last to go


_WITHIN = ".*."
"""Stands for the adapter's name in that of a parameter."""


def _key(config: RunConfig) -> str | None:
    """What a start depends on; None where it is more than random numbers."""
    lora = config.lora
    if lora.modules_to_save or lora.use_dora or lora.bias is not Bias.none or lora.init is not LoraInit.default:
        return None
    dtype, _ = compute_dtype(config.quant)  # to which PEFT rounds it
    return f"{config.seed} {config.model} {config.quant.type} {dtype} {replace(lora, alpha=1.0, dropout=0.0)}"


def _parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    return {key.replace(f".{name}.", _WITHIN): p for key, p in model.named_parameters() if f".{name}." in key}
