"""Runs micro-batches; on a GPU each length is recorded once as a CUDA graph and replayed from then on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_lab.engine.network import Inputs, Network
from llama_lab.engine.rows import RowBounds
from llama_lab.engine.stream import Stream


@dataclass(kw_only=True)
class _Recorded:
    """The inputs of one length, whose memory a recorded graph reads."""

    inputs: Inputs
    num_runs: int = 0
    graph: Any = None


class Replay:
    """Gives micro-batches to a network."""

    def __init__(self, network: Network, *, longest: int, record: bool) -> None:
        """
        Args:
            longest: no row is longer; recorded graphs attend as far.
            record: with CUDA graphs.
        """
        self.network, self.longest, self.record = network, longest, record
        self.device = network.embedding.device
        self.losses_K = network.adapter.master_KS.new_zeros(len(network.adapter.master_KS))
        """To which every run adds."""
        self.by_length: dict[int, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle() if record else None

    def run(self, stream: Stream, keys: Tensor, share: float) -> None:
        """Losses and gradients of one micro-batch, each learned token counted as `share` in the loss."""
        if not self.record:
            self.network.forward_backward(self._inputs(stream, keys, share))
            return
        known = self.by_length.get(len(stream.ids))
        if known is None:
            known = self.by_length[len(stream.ids)] = _Recorded(inputs=self._inputs(stream, keys, share))
        else:
            self._fill(known.inputs, stream, keys, share)
        if known.num_runs == 1:
            # the first run compiled all and warmed up; recording computes nothing
            known.graph = self._recorded(known.inputs)
        known.num_runs += 1
        if known.graph is None:
            self.network.forward_backward(known.inputs)
        else:
            known.graph.replay()

    def take_losses(self) -> list[float]:
        """The sums of the losses since the last time; waits for the GPU."""
        losses = self.losses_K.tolist()
        self.losses_K.zero_()
        return losses

    def _recorded(self, inputs: Inputs) -> Any:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # what the first run needed is needed again in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.network.forward_backward(inputs)
        return graph

    def _inputs(self, stream: Stream, keys: Tensor, share: float) -> Inputs:
        longest = self.longest if self.record else stream.longest
        return Inputs(
            ids_KN=stream.ids.to(self.device)[None],
            targets_KN=stream.targets.to(self.device)[None],
            positions_KN=stream.positions.to(self.device)[None],
            rows=RowBounds(starts=stream.starts.to(self.device), longest=longest, spans=stream.spans),
            keys=keys.to(self.device),
            share_K=torch.full_like(self.losses_K, share),
            losses_K=self.losses_K,
        )

    def _fill(self, inputs: Inputs, stream: Stream, keys: Tensor, share: float) -> None:
        for to, value in (
            (inputs.ids_KN, stream.ids[None]),
            (inputs.targets_KN, stream.targets[None]),
            (inputs.positions_KN, stream.positions[None]),
            (inputs.rows.starts, stream.starts),
            (inputs.keys, keys.pin_memory()),
        ):
            to.copy_(value, non_blocking=True)
        inputs.share_K.fill_(share)
