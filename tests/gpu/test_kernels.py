"""Our own kernels beside the plain operations that say what they compute."""

import pytest
import torch

from llama_lab.engine import kernels
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.entering import Gated, Normed, Plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SIZES = [(1, 300, 3, 16, 512), (2, 70, 2, 8, 200), (3, 129, 1, 72, 1408), (1, 2048, 1, 64, 4096)]
"""Adapters, tokens, layers, rank, inputs."""


def keys_of(num_adapters, num_layers):
    return torch.stack([step_keys(k, 3, 1, [1.5] * num_layers, 0.3) for k in range(num_adapters)])


def apart(num_adapters, *shape):
    """A buffer in which adapters do not lie next to each other."""
    size = torch.Size(shape).numel()
    return torch.randn(num_adapters, size + 64)[:, :size].unflatten(1, shape)


def close(found, wanted):
    """Up to the rounding of bf16, where sums are of thousands of numbers."""
    assert (found.float().cpu() - wanted).abs().max() < 0.02 * wanted.abs().max()


def on_gpu(x):
    return x.to("cuda", torch.bfloat16)


def rounded(*shape):
    return torch.randn(shape).bfloat16().float()


@pytest.mark.parametrize(("num_adapters", "num_tokens", "num_layers", "rank", "width"), SIZES)
def test_low_rank_products_of_a_thinned_input(num_adapters, num_tokens, num_layers, rank, width):
    x, keys = rounded(num_adapters, num_tokens, width), keys_of(num_adapters, num_layers)
    a = apart(num_adapters, num_layers, rank, width).bfloat16().float()
    found = kernels.thinned_low(on_gpu(x), on_gpu(a), keys.cuda())
    close(found, kernels.thinned_low(x, a, keys))


@pytest.mark.parametrize("source", ["plain", "normed", "gated"])
@pytest.mark.parametrize(("num_adapters", "num_tokens", "num_layers", "rank", "width"), SIZES)
def test_gradient_of_a(source, num_adapters, num_tokens, num_layers, rank, width):
    x, keys = rounded(num_adapters, num_tokens, width), keys_of(num_adapters, num_layers)
    low, weight, rstd = (
        rounded(num_adapters, num_layers, num_tokens, rank),
        rounded(width),
        torch.rand(x.shape[:2])[..., None],
    )
    gate_up = rounded(num_adapters, num_tokens, 2 * width)
    plain, there = {
        "plain": (Plain(x=x), Plain(x=on_gpu(x))),
        "normed": (
            Normed(x=x, weight=weight, rstd=rstd),
            Normed(x=on_gpu(x), weight=on_gpu(weight), rstd=rstd.cuda()),
        ),
        "gated": (Gated(gate_up=gate_up), Gated(gate_up=on_gpu(gate_up))),
    }[source]
    wanted, found = (torch.zeros(num_adapters, num_layers * rank * width + 64) for _ in range(2))
    found = on_gpu(found)
    shape = (num_layers, rank, width)
    kernels.thinned_grad_a(plain, low, keys, wanted[:, :-64].unflatten(1, shape))
    kernels.thinned_grad_a(there, on_gpu(low), keys.cuda(), found[:, :-64].unflatten(1, shape))
    close(found, wanted)


@pytest.mark.parametrize(("num_adapters", "num_tokens", "num_layers", "rank", "width"), SIZES)
def test_what_comes_back_through_a(num_adapters, num_tokens, num_layers, rank, width):
    wanted, keys = rounded(num_adapters, num_tokens, width), keys_of(num_adapters, num_layers)
    a, low = (
        apart(num_adapters, num_layers, rank, width).bfloat16().float(),
        rounded(num_adapters, num_layers, num_tokens, rank),
    )
    found = on_gpu(wanted)
    kernels.add_thinned(wanted, low, a, keys)
    kernels.add_thinned(found, on_gpu(low), on_gpu(a), keys.cuda())
    close(found, wanted)


def test_gate_back():
    grad, gate_up = rounded(2, 70, 1408), rounded(2, 70, 2816)
    close(kernels.gate_back(on_gpu(grad), on_gpu(gate_up)), kernels.gate_back(grad, gate_up))
