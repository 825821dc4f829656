"""The frozen weights of linear layers that share their input, as one matrix in the compute type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """Weights one below the other, such as those of q, k and v: one product instead of three."""

    def __init__(self, layers: Sequence[Any], *, keep: bool) -> None:
        """
        Args:
            layers: linear layers, with or without PEFT around them.
            keep: 4-bit weights stay dequantised in memory; else they are dequantised at every call.
        """
        self.bases = [base_of(layer) for layer in layers]
        self.sizes = [base.out_features for base in self.bases]
        self.num_inputs = self.bases[0].in_features
        self.whole: Tensor | None = None
        if all(dense_weight(base) is not None for base in self.bases):
            self.whole = stacked(self.bases)
        elif keep:
            self.whole = self._dequantised()

    def weight(self) -> Tensor:
        """(sum of outputs, inputs)."""
        return self._dequantised() if self.whole is None else self.whole

    def _dequantised(self) -> Tensor:
        like = self.bases[0].weight
        whole = torch.empty(sum(self.sizes), self.num_inputs, dtype=like.quant_state.dtype, device=like.device)
        for base, part in zip(self.bases, whole.split(self.sizes), strict=True):
            _dequantise_into(base.weight, part)
        return whole


def base_of(layer: Any) -> Any:
    """The linear layer under PEFT's, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def dense_weight(base: Any) -> Tensor | None:
    """The frozen weight as the numbers it stands for; None where it is kept in 4 or 8 bits alone."""
    if type(base) is nn.Linear:
        return None if base.weight.requires_grad else base.weight.data
    return getattr(base, "dense_weight", None)


def stacked(bases: Sequence[Any]) -> Tensor:
    """Dense weights one below the other; each layer keeps its own as a part of that, so that none lies there twice."""
    weights = [weight for base in bases if (weight := dense_weight(base)) is not None]
    if len(weights) == 1:
        return weights[0]
    whole = torch.cat(weights)
    for base, weight in zip(bases, whole.split([base.out_features for base in bases]), strict=True):
        if type(base) is nn.Linear:
            base.weight.data = weight
        else:
            base.dense_weight = weight
    return whole


def _dequantise_into(weight: Any, out: Tensor) -> None:
    from bitsandbytes.functional import dequantize_4bit

    if out.is_cuda:
        dequantize_4bit(weight.data, weight.quant_state, out=out)
    else:  # bitsandbytes has no such operation with an output on the CPU
        out.copy_(dequantize_4bit(weight.data, weight.quant_state))
