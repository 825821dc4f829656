"""Dropout whose masks depend on nothing but seed, step, layer and place: no state to save, the same in a recomputation.

K adapters, P adapted layers of a projection, N tokens, D inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KEY_WORDS = 4
"""Numbers of a key in memory; two are used, four keep every key where a GPU reads 16 bytes at once."""


def step_keys(seed: int, step: int, micro_step: int, num_layers: int) -> Tensor:
    """Keys (num_layers, KEY_WORDS), int32, of one micro-batch: equal arguments, equal masks."""
    rng = np.random.Generator(np.random.Philox(key=[seed, (step << 20) + micro_step]))
    return torch.from_numpy(rng.integers(-(2**31), 2**31, size=(num_layers, KEY_WORDS), dtype=np.int32))


def drawn(keys_KPW: Tensor, num_tokens: int, width: int, share: float) -> Tensor:
    """What `kept` takes: on a GPU the keys, from which masks are computed where they are read; else the masks."""
    if keys_KPW.is_cuda:
        return keys_KPW
    masks = torch.empty(*keys_KPW.shape[:2], num_tokens, width, dtype=torch.bool)
    for key, mask in zip(keys_KPW.flatten(0, 1).tolist(), masks.flatten(0, 1), strict=True):
        mask.bernoulli_(1 - share, generator=torch.Generator().manual_seed((key[0] << 32) + (key[1] & 0xFFFFFFFF)))
    return masks


def kept(drawn_K: Tensor, num_tokens: int, width: int, share: float) -> Tensor:
    """(K, N, D), true where an input goes into the A of one layer; `share` of them are left out.

    Each place is hashed with its key: two multiplications (by the factors of C. Wellons, "Prospecting for hash
    functions", 2018), a word of the key before each. The high bits decide; they are the best mixed.

    Args:
        drawn_K: what `drawn` gave for this layer.
    """
    if drawn_K.dtype is torch.bool:
        return drawn_K
    place_ND = torch.arange(num_tokens * width, dtype=torch.int32, device=drawn_K.device).view(num_tokens, width)
    first, second = drawn_K[..., 0, None, None], drawn_K[..., 1, None, None]
    h = (place_ND + first) * 0x7FEB352D
    h = ((h ^ ((h >> 16) & 0xFFFF)) ^ second) * (0x846CA68B - 2**32)
    return h >= int(share * 2**32) - 2**31
