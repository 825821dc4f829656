"""Gradients of attention that torch and cuDNN compute. python -m pytest tests/gpu -n 0: on a machine with a GPU."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llama_lab.model import avoid_cudnn_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SCORE = -150.0
"""Of every query with every key: exp(150) is more than fp32 holds."""


def gradients(num_tokens):
    """Of q, k and v, in causal attention with a mask; the first dimension alone makes the scores."""
    q, k, v = (torch.randn(2, 3, num_tokens, 64, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in "qkv")
    q[..., 0], k[..., 0] = 1, SCORE * 64**0.5
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device="cuda").tril()
    scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    return q.grad, k.grad, v.grad


@pytest.mark.parametrize("num_tokens", [64, 192, 256])
def test_gradients_with_a_mask_are_finite(num_tokens):
    torch.backends.cuda.enable_cudnn_sdp(True)
    is_broken = not all(grad.isfinite().all() for grad in gradients(num_tokens))
    avoid_cudnn_attention()
    assert all(grad.isfinite().all() for grad in gradients(num_tokens)), f"cuDNN alone: {is_broken}"
