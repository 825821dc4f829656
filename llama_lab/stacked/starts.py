"""The numbers that adapters begin with, drawn once for all that begin alike.

PEFT draws each matrix twice, on the CPU: half a second to two for an adapter of a 7B, in which its stack stands still.
The trials of a study mostly share their seed, so that adapters of one rank begin with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama_lab.choices import Bias, LoraInit
from llama_lab.config import LoraSettings
from llama_lab.lora import add_named_adapter

if TYPE_CHECKING:
    from peft import PeftModel

KEPT = 4
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
            own = nn.Parameter(self.weights[key].to(model.device, param.dtype), requires_grad=param.requires_grad)
            setattr(model.get_submodule(f"{path}.{name}"), attribute, own)
        torch.set_rng_state(self.torch_state)


class Starts:
    """Those of one base, the last used ones."""

    def __init__(self) -> None:
        """None yet."""
        self._known: dict[str, Start] = {}

    def keep(self, model: PeftModel, name: str, lora: LoraSettings, *, seed: int) -> None:
        """Remember what an adapter, which has just been made, begins with."""
        if (key := _key(lora, seed)) is not None:
            self._known[key] = Start.of(model, name)
            while len(self._known) > KEPT:
                del self._known[next(iter(self._known))]

    def add(self, model: PeftModel, name: str, lora: LoraSettings, *, seed: int) -> None:
        """One more adapter, to the bit as of add_named_adapter, which says what it raises."""
        key = _key(lora, seed)
        if key not in self._known:
            add_named_adapter(model, name, lora, seed=seed)
            self.keep(model, name, lora, seed=seed)
            return
        add_named_adapter(model, name, lora, seed=seed, empty=True)
        start = self._known.pop(key)
        start.put(model, name)
        self._known[key] = start  # the last used one is the last to go


_WITHIN = ".*."
"""Stands for the adapter's name in that of a parameter."""


def _key(lora: LoraSettings, seed: int) -> str | None:
    """What a start depends on; None where it is more than random numbers."""
    if lora.modules_to_save or lora.use_dora or lora.bias is not Bias.none or lora.init is not LoraInit.default:
        return None
    return f"{seed} {replace(lora, alpha=1.0, dropout=0.0)}"


def _parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    return {key.replace(f".{name}.", _WITHIN): p for key, p in model.named_parameters() if f".{name}." in key}
