"""Runs micro-batches; on a GPU each size is recorded once as a CUDA graph and replayed from then on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from llama_lab.engine.batch import Batch
from llama_lab.engine.network import Inputs, Network
from llama_lab.engine.rows import RowBounds


@dataclass(kw_only=True)
class _Recorded:
    """The inputs of one size, whose memory a recorded graph reads."""

    inputs: Inputs
    longest: int
    num_runs: int = 0
    graph: Any = None

    def fits(self, batch: Batch) -> bool:
        """Whether rows are no longer and no more than those that were recorded."""
        return self.longest == batch.longest and len(self.inputs.rows.starts) == len(batch.starts)


class Replay:
    """Gives micro-batches to a network."""

    def __init__(self, network: Network, *, record: bool) -> None:
        """
        Args:
            record: with CUDA graphs.
        """
        self.network, self.record = network, record
        self.device = network.embedding.device
        self.losses_K = network.adapter.master_KS.new_zeros(len(network.adapter.master_KS))
        """To which every run adds."""
        self.by_size: dict[tuple[int, ...], _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle() if record else None

    def run(self, batch: Batch) -> None:
        """Losses and gradients of one micro-batch of the first adapters."""
        if not self.record:
            self.network.forward_backward(self._inputs(batch))
            return
        size = tuple(batch.tokens_3KN.shape)
        known = self.by_size.get(size)
        if known is None or not known.fits(batch):
            known = self.by_size[size] = _Recorded(inputs=self._inputs(batch), longest=batch.longest)
        else:
            _fill(known.inputs, batch)
        if known.num_runs == 1:
            # the first run compiled all and warmed up; recording computes nothing
            known.graph = self._recorded(known.inputs)
        known.num_runs += 1
        if known.graph is None:
            self.network.forward_backward(known.inputs)
        else:
            known.graph.replay()

    def _recorded(self, inputs: Inputs) -> Any:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # what the first run needed is needed again in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that writes a checkpoint may wait for its copy meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.network.forward_backward(inputs)
        return graph

    def _inputs(self, batch: Batch) -> Inputs:
        tokens_3KN = batch.tokens_3KN.to(self.device)
        return Inputs(
            tokens_3KN=tokens_3KN,
            rows=RowBounds(starts=batch.starts.to(self.device), longest=batch.longest, spans=batch.spans),
            keys_PKW=batch.keys_PKW.to(self.device),
            share_K=batch.share_K.to(self.device),
            losses_K=self.losses_K[: tokens_3KN.shape[1]],
        )


def _fill(inputs: Inputs, batch: Batch) -> None:
    for to, value in (
        (inputs.tokens_3KN, batch.tokens_3KN),
        (inputs.rows.starts, batch.starts),
        (inputs.keys_PKW, batch.keys_PKW),
        (inputs.share_K, batch.share_K),
    ):
        to.copy_(value, non_blocking=True)
