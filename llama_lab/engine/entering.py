"""What entered a projection, kept as what it can be computed from again.

K adapters, N tokens of each adapter, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llama_lab.engine.kernels import gate
from llama_lab.engine.pieces import Pieces


@dataclass(kw_only=True)
class Plain:
    """Itself."""

    x: Tensor

    def value(self, pieces: Pieces) -> Tensor:
        """(K, N, D)."""
        return self.x


@dataclass(kw_only=True)
class Normed:
    """The norm of the residual stream."""

    x: Tensor
    weight: Tensor
    rstd: Tensor
    """(K, N, 1) in fp32 or wider."""

    def value(self, pieces: Pieces) -> Tensor:
        """(K, N, D)."""
        return pieces("normed_by")(self.x, self.weight, self.rstd)


@dataclass(kw_only=True)
class Gated:
    """What the MLP makes of its gate and up projections."""

    gate_up: Tensor
    """(K, N, 2 D), gate first."""

    def value(self, pieces: Pieces) -> Tensor:
        """(K, N, D)."""
        return gate(self.gate_up)


Entering = Plain | Normed | Gated
