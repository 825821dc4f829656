"""The frozen weights of linear layers that share their input, as one matrix in the compute type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_lab.engine.pieces import Pieces


class Frozen:
    """Weights one below the other, such as those of q, k and v: one product instead of three."""

    def __init__(self, layers: Sequence[Any], pieces: Pieces, *, keep: bool) -> None:
        """
        Args:
            layers: linear layers, with or without PEFT around them.
            keep: 4-bit weights stay dequantised in memory; else they are dequantised at every call.
        """
        self.bases = [base_of(layer) for layer in layers]
        self.sizes = [base.out_features for base in self.bases]
        self.num_inputs = self.bases[0].in_features
        self.pieces = pieces
        self.whole: Tensor | None = None
        self.nested: _Nested | None = None
        if all(dense_weight(base) is not None for base in self.bases):
            self.whole = stacked(self.bases)
            return
        self.nested = _nested([base.weight.quant_state for base in self.bases])
        if keep:
            self.whole = self._dequantised()

    def weight(self) -> Tensor:
        """(sum of outputs, inputs)."""
        return self._dequantised() if self.whole is None else self.whole

    @contextmanager
    def held(self) -> Iterator[None]:
        """Dequantise once for all calls in here, not at each."""
        kept, self.whole = self.whole, self.weight()
        try:
            yield
        finally:
            self.whole = kept

    def _dequantised(self) -> Tensor:
        like = self.bases[0].weight
        whole = torch.empty(sum(self.sizes), self.num_inputs, dtype=like.quant_state.dtype, device=like.device)
        scales = self._scales()
        for base, part, scale in zip(self.bases, whole.split(self.sizes), scales, strict=True):
            _dequantise_into(base.weight, part, scale)
        return whole

    def _scales(self) -> Sequence[Tensor | None]:
        """Of the blocks of each weight; None where bitsandbytes looks them up itself."""
        n = self.nested
        if n is None:
            return [None] * len(self.bases)
        return self.pieces("scales_of")(n.codes, n.scales, n.offsets, n.code).split(n.sizes)


@dataclass(kw_only=True)
class _Nested:
    """The doubly quantised scales of several weights, read at once: bitsandbytes needs two kernels for each."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    code: Tensor
    sizes: list[int]


def _nested(states: Sequence[Any]) -> _Nested | None:
    """None where the scales are not quantised, or do not fill whole blocks. The states keep parts of what is joined."""
    if not all(s.nested and s.absmax.numel() % s.state2.blocksize == 0 for s in states):
        return None
    sizes = [s.absmax.numel() for s in states]
    codes = torch.cat([s.absmax for s in states])
    for s, part in zip(states, codes.split(sizes), strict=True):
        s.absmax = part
    return _Nested(
        codes=codes.view(-1, states[0].state2.blocksize),
        scales=torch.cat([s.state2.absmax for s in states])[:, None],
        offsets=torch.cat([s.offset.expand(len(s.state2.absmax)) for s in states])[:, None].contiguous(),
        code=states[0].state2.code,
        sizes=sizes,
    )


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


def _dequantise_into(weight: Any, out: Tensor, scale: Tensor | None) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = weight.quant_state
    if scale is not None:
        state = QuantState(
            absmax=scale, shape=out.shape, dtype=out.dtype, blocksize=state.blocksize, quant_type=state.quant_type
        )
    if out.is_cuda:
        dequantize_4bit(weight.data, state, out=out)
    else:  # bitsandbytes has no such operation with an output on the CPU
        out.copy_(dequantize_4bit(weight.data, state))
