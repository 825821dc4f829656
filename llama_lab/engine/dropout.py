"""Dropout whose masks depend on nothing but seed, step, layer and place: no state to save, the same in a recomputation.

Said here in plain operations; on a GPU lora_kernels.py computes the same where an input is read. K adapters, W words of
a key, N tokens, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEY_WORDS = 4
"""Numbers of a key: two that are hashed, the hash from which on a place is kept, and what is kept is multiplied by."""


def step_keys(seed: int, step: int, micro_step: int, scales: Sequence[float], share: float = 0.0) -> Tensor:
    """Keys (layers, KEY_WORDS), int32, of one micro-batch: equal arguments, equal masks.

    Args:
        scales: alpha / r of each layer: multiplied here, where it costs nothing.
        share: of the inputs that are left out; a part of the keys, so that it may differ by adapter and change.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, (step << 20) + micro_step]))
    keys = rng.integers(-(2**31), 2**31, size=(len(scales), KEY_WORDS), dtype=np.int32)
    keys[:, 2] = int(share * 2**32) - 2**31
    keys[:, 3] = (np.asarray(scales, dtype=np.float32) / np.float32(1 - share)).view(np.int32)
    return torch.from_numpy(keys)


def thinned(x_KND: Tensor, keys_KW: Tensor) -> Tensor:
    """What goes into the A of one layer: 0 where it is left out, the rest times s and scaled up to keep its mean."""
    scaled = x_KND * keys_KW[:, 3, None, None].view(torch.float32)  # in fp32: bf16 has too few digits for the factor
    return torch.where(kept(keys_KW, x_KND.shape[1], x_KND.shape[2]), scaled, 0).to(x_KND.dtype)


def kept(keys_KW: Tensor, num_tokens: int, width: int) -> Tensor:
    """(K, N, D), true where an input goes into the A of one layer.

    Each place is hashed with its key: two multiplications (by the factors of C. Wellons, "Prospecting for hash
    functions", 2018), a word of the key before each. The high bits decide; they are the best mixed.
    """
    place_ND = torch.arange(num_tokens * width, dtype=torch.int32, device=keys_KW.device).view(num_tokens, width)
    first, second, least = (keys_KW[:, i, None, None] for i in range(3))
    h = (place_ND + first) * 0x7FEB352D
    h = ((h ^ ((h >> 16) & 0xFFFF)) ^ second) * (0x846CA68B - 2**32)
    return h >= least
