"""The element-wise parts of a Llama block, forward and backward, each one kernel when compiled.

Plain functions of tensors: nothing here is known to autograd. N tokens, I intermediate size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from llama_lab.data.templates import IGNORED


def added(x: Tensor, delta: Tensor | None) -> Tensor:
    """The residual stream behind a branch."""
    return x if delta is None else x + delta


def normed_by(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The norm again, from ``1 / sqrt(mean(x²) + eps)``."""
    return weight * (x * rstd).to(x.dtype)


def added_normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream; its norm ``weight · x / sqrt(mean(x²) + eps)`` (arXiv 1910.07467), which is what a branch
    reads of it, in fp32 as transformers does; and what it was multiplied by, (..., 1)."""
    x = added(x, delta)
    wide = x.to(_wide(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x, normed_by(x, weight, rstd), rstd


def norm_back(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None) -> Tensor:
    """Gradient of the residual stream, from that of its norm and from `residual` past the branch."""
    g, out_wide = (grad * weight).to(_wide(x)), x * rstd
    out = rstd * (g - out_wide * (g * out_wide).mean(-1, keepdim=True))
    return out.to(x.dtype) if residual is None else (out + residual).to(x.dtype)


def scales_of(codes: Tensor, scales: Tensor, offsets: Tensor, code: Tensor) -> Tensor:
    """fp32 scales of 4-bit blocks, of scales that are quantised themselves (double quantisation, arXiv 2305.14314).

    Args:
        codes: (blocks, numbers of a block) uint8, places in `code`.
        scales, offsets: (blocks, 1).
        code: the 256 values of a number.
    """
    return (code[codes.int()] * scales + offsets).flatten()


def head_error(logits_NV: Tensor, target_N: Tensor, share_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token in nats, 0 where nothing is learned, and the gradient of the logits.

    Args:
        share_N: what each token counts in the loss.
    """
    wide = logits_NV.to(_wide(logits_NV))
    wide = wide - wide.amax(dim=-1, keepdim=True)
    sums = wide.exp().sum(dim=-1, keepdim=True)
    learned = target_N != IGNORED
    wanted = torch.where(learned, target_N, 0)
    chosen = wide.gather(1, wanted[:, None])
    loss = torch.where(learned, (sums.log() - chosen)[:, 0] * share_N, 0)
    is_target = torch.arange(wide.shape[1], device=wide.device)[None] == wanted[:, None]
    error = (wide.exp() / sums - is_target.to(wide.dtype)) * torch.where(learned, share_N, 0)[:, None]
    return loss, error.to(logits_NV.dtype)


OF_WEIGHTS = ("scales_of",)
"""Functions without tokens."""


class Pieces:
    """The functions of this module, compiled or as they are."""

    def __init__(self, *, compiled: bool, any_number: bool = False) -> None:
        """
        Args:
            any_number: compile once for any number of tokens, so that more or fewer adapters are nothing new.
        """
        self.compiled, self.any_number = compiled, any_number
        self._made: dict[tuple[str, str], Callable[..., Any]] = {}

    def __call__(self, name: str, place: str = "") -> Callable[..., Any]:
        """The function `name` for one place of the block, whose sizes differ from those of other places.

        Each place gets a function of its own: the compiler then takes all sizes but the tokens' for constants.
        """
        if not self.compiled:
            return globals()[name]
        if (name, place) not in self._made:
            plain = globals()[name]
            own = FunctionType(plain.__code__.replace(co_name=f"{name}_{place}"), globals(), name)
            made = torch.compile(own, fullgraph=True)
            by_number = self.any_number and name not in OF_WEIGHTS
            self._made[name, place] = partial(_for_any_number, made) if by_number else made
        return self._made[name, place]


@cache
def pieces_for(sizes: tuple[Any, ...]) -> Pieces:
    """Those of all stacks in this process whose model has these sizes.

    Other sizes get others, or the compiler would take what differs for a variable.
    """
    return Pieces(compiled=True, any_number=True)


def _for_any_number(made: Callable[..., Any], *args: Any) -> Any:
    """Call a compiled function with the tokens of all adapters in one dimension, which it takes for any number.

    Two dimensions of them would make one adapter, or one with another number of tokens, a new case.
    """
    first = next(arg for arg in args if isinstance(arg, Tensor))
    by_adapter = first.shape[:-1]
    joined = [_by_token(arg, by_adapter) for arg in args]
    found = made(*joined)
    if isinstance(found, Tensor):
        return found.unflatten(0, by_adapter)
    return tuple(part.unflatten(0, by_adapter) for part in found)


def _by_token(arg: Any, by_adapter: torch.Size) -> Any:
    """Weights and numbers as they are; tensors of tokens with one dimension for these."""
    if not isinstance(arg, Tensor) or arg.shape[: len(by_adapter)] != by_adapter:
        return arg
    # no view any more: of a view the compiler takes the number of adapters of what lies behind it for a constant
    arg = arg.flatten(0, len(by_adapter) - 1).detach()
    maybe_mark_dynamic(arg, 0)
    return arg


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
