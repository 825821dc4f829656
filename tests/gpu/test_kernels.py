"""Our own kernels beside the plain operations that say what they compute.

python -m pytest tests/gpu/test_kernels.py -n 0                          # on a machine with a GPU; elsewhere skipped
TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kernels.py -n 0       # without one: pip install triton, and minutes
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from llama_lab.engine import kernels
from llama_lab.engine.adapter import Layout
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.entering import Gated, Normed, Plain
from llama_lab.engine.optimizer import NOTHING, Update, Used, adamw
from llama_lab.engine.rows import RowBounds
from llama_lab.engine.turned import attend_turned, places_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
RUNS = DEVICE == "cuda" or IS_INTERPRETED
if RUNS:
    from llama_lab.engine import triton_attention, triton_kernels, triton_lora

pytestmark = pytest.mark.skipif(not RUNS, reason="there is no GPU, and Triton does not interpret")

SIZES = [(1, 300, 3, 16, 512), (1, 300, 2, 32, 512), (2, 70, 2, 8, 200), (3, 129, 1, 72, 1408), (1, 2048, 1, 64, 4096)]
"""Adapters, tokens, layers, rank, inputs."""
ON_GPU = {"dtype": torch.bfloat16}


def keys_of(num_adapters, num_layers):
    return torch.stack([step_keys(k, 3, 1, [1.5] * num_layers, 0.3) for k in range(num_adapters)])


def apart(num_adapters, *shape):
    """A buffer in which adapters do not lie next to each other."""
    size = torch.Size(shape).numel()
    return torch.randn(num_adapters, size + 64)[:, :size].unflatten(1, shape)


def close(found, wanted):
    """Up to the rounding of bf16, where sums are of thousands of numbers."""
    assert (found.float().cpu() - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.fixture(autouse=True, params=[torch.float32] if IS_INTERPRETED else [torch.bfloat16, torch.float32])
def dtype(request, monkeypatch):
    """The interpreter does not know bf16."""
    monkeypatch.setitem(ON_GPU, "dtype", request.param)


@pytest.fixture
def tiles_of_attention(dtype):
    """Its tiles are for numbers of 16 bits."""
    if ON_GPU["dtype"] is torch.float32 and not IS_INTERPRETED:
        pytest.skip("its tiles are for bf16")


def on_gpu(x):
    return x.to(DEVICE, **ON_GPU)


def rounded(*shape):
    return torch.randn(shape).bfloat16().float()


@pytest.mark.parametrize(("num_adapters", "num_tokens", "num_layers", "rank", "width"), SIZES)
def test_low_rank_products_of_a_thinned_input(num_adapters, num_tokens, num_layers, rank, width):
    x, keys = rounded(num_adapters, num_tokens, width), keys_of(num_adapters, num_layers)
    a = apart(num_adapters, num_layers, rank, width).bfloat16().float()
    found = triton_lora.thinned_low(on_gpu(x), on_gpu(a), keys.to(DEVICE))
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
            Normed(x=on_gpu(x), weight=on_gpu(weight), rstd=rstd.to(DEVICE)),
        ),
        "gated": (Gated(gate_up=gate_up), Gated(gate_up=on_gpu(gate_up))),
    }[source]
    wanted, found = (torch.zeros(num_adapters, num_layers * rank * width + 64) for _ in range(2))
    found = on_gpu(found)
    shape = (num_layers, rank, width)
    kernels.thinned_grad_a(plain, low, keys, wanted[:, :-64].unflatten(1, shape))
    triton_lora.thinned_grad_a(there, on_gpu(low), keys.to(DEVICE), found[:, :-64].unflatten(1, shape))
    close(found, wanted)


@pytest.mark.parametrize(("num_adapters", "num_tokens", "num_layers", "rank", "width"), SIZES)
def test_what_comes_back_through_a(num_adapters, num_tokens, num_layers, rank, width):
    wanted, keys = rounded(num_adapters, num_tokens, width), keys_of(num_adapters, num_layers)
    a, low = (
        apart(num_adapters, num_layers, rank, width).bfloat16().float(),
        rounded(num_adapters, num_layers, num_tokens, rank),
    )
    found = on_gpu(wanted.clone())
    kernels.add_thinned(wanted, low, a, keys)
    triton_lora.add_thinned(found, on_gpu(low), on_gpu(a), keys.to(DEVICE))
    close(found, wanted)


def test_gate():
    grad, gate_up = rounded(2, 70, 1408), rounded(2, 70, 2816)
    close(triton_kernels.gate(on_gpu(gate_up)), kernels.gate(gate_up))
    close(triton_kernels.gate_back(on_gpu(grad), on_gpu(gate_up)), kernels.gate_back(grad, gate_up))
    low, a, keys = rounded(2, 1, 70, 16), rounded(2, 1, 16, 1408), keys_of(2, 1)
    there = [on_gpu(x) for x in (grad, low, a)]
    found = triton_lora.gate_back_thinned(*there, keys.to(DEVICE), on_gpu(gate_up))
    close(found, kernels.gate_back_thinned(grad, low, a, keys, gate_up))


@pytest.mark.parametrize(
    ("outs", "starts"),
    [([512] * 3, [0, 512, 1024]), ([512, 64, 64], [0, 512, 576]), ([512, 512], [0, 1024]), ([64], [0])],
)
@pytest.mark.parametrize(("num_adapters", "num_tokens", "rank"), [(1, 300, 16), (3, 70, 8), (1, 150, 32)])
def test_both_gradients_behind_b(num_adapters, num_tokens, rank, outs, starts):
    places = [slice(start, start + size) for start, size in zip(starts, outs, strict=True)]
    layout = Layout(sizes=[(64, outs)], rank=rank)
    work, grad = rounded(num_adapters, layout.size), rounded(num_adapters, num_tokens, places[-1].stop)
    low = rounded(num_adapters, num_tokens, len(outs), rank).transpose(1, 2)
    wanted, found = torch.zeros_like(work), on_gpu(torch.zeros_like(work))
    plain = kernels.back_low(grad, places, low, layout.views(work)[0].b_KOR, layout.views(wanted)[0].b_KOR)
    there = layout.views(on_gpu(work))[0].b_KOR
    close(triton_lora.back_low(on_gpu(grad), places, on_gpu(low), there, layout.views(found)[0].b_KOR), plain)
    close(found, wanted)


@pytest.mark.parametrize(("num_q", "num_kv", "size"), [(4, 2, 64), (32, 32, 128), (9, 3, 64), (4, 4, 96)])
def test_rotation(num_q, num_kv, size):
    qkv, cos, sin = rounded(37, num_q + 2 * num_kv, size), rounded(37, size), rounded(37, size)
    found = on_gpu(qkv.clone())
    triton_kernels.turn(found, on_gpu(cos), on_gpu(sin), num_q + num_kv)
    kernels.turn(qkv, cos, sin, num_q + num_kv)
    close(found, qkv)


@pytest.mark.usefixtures("tiles_of_attention")
@pytest.mark.parametrize(("num_q", "num_kv", "size"), [(4, 4, 128), (6, 2, 64), (2, 1, 16)])
@pytest.mark.parametrize(
    "lengths", [[[200]], [[1, 130, 3, 60, 64, 42]], [[64, 64], [128], [1] * 128]], ids=["one", "some", "three adapters"]
)
def test_attention_of_rows(num_q, num_kv, size, lengths):
    num_tokens, flat = sum(lengths[0]), [length for rows in lengths for length in rows]
    ends = [sum(flat[: i + 1]) for i in range(len(flat))]
    starts = torch.tensor([0, *ends, ends[-1], ends[-1]], dtype=torch.int32)
    angles = torch.rand(ends[-1], size // 2)
    cos, sin = torch.cat([angles.cos()] * 2, dim=1), torch.cat([angles.sin()] * 2, dim=1)
    rows = RowBounds(starts=starts, longest=max(flat), spans=list(pairwise([0, *ends])))
    places = places_of(rows, cos, sin, len(lengths))
    qkv, grad = rounded(ends[-1], num_q + 2 * num_kv, size), rounded(ends[-1], num_q, size)
    bounds = triton_attention.bounds_of(starts.to(DEVICE), len(lengths), num_tokens)
    there = replace(
        places,
        bounds=bounds,
        cos_NE=on_gpu(cos),
        sin_NE=on_gpu(places.sin_NE),
        back_sin_NE=on_gpu(places.back_sin_NE),
    )
    found = attend_turned(on_gpu(qkv.clone()), num_kv, size**-0.5, there)
    wanted = attend_turned(qkv, num_kv, size**-0.5, places)
    close(found.out, wanted.out)
    close(found.back(on_gpu(grad)), wanted.back(grad))


@pytest.mark.usefixtures("tiles_of_attention")
def test_a_row_that_is_not_finite_leaves_other_adapters_alone():
    starts, cos, sin = torch.tensor([0, 40, 80, 120], dtype=torch.int32), torch.ones(120, 64), torch.zeros(120, 64)
    bounds = triton_attention.bounds_of(starts.to(DEVICE), 3, 40)
    qkv, grad = on_gpu(torch.randn(120, 6, 64)), on_gpu(torch.randn(120, 2, 64))
    found = []
    for value in (0.0, float("nan")):
        qkv[40:80] = value
        out, lse = triton_attention.attend(qkv, 2, 0.1, bounds)
        forward = triton_attention.Forward(qkv_NHE=qkv, out_NHE=out, lse_HN=lse, num_kv=2, scale=0.1)
        found.append((out, triton_attention.attend_back(grad, forward, bounds, on_gpu(cos), on_gpu(sin))))
    for one, other in zip(*found, strict=True):
        assert other[40:80].isnan().all()
        assert torch.equal(one[:40], other[:40])
        assert torch.equal(one[80:], other[80:])


def test_an_update_leaves_padding_and_rows_that_do_not_step_alone():
    layout, rank_K = Layout(sizes=[(600, [24, 56]), (24, [40])], rank=8), torch.tensor([8, 4, 2], dtype=torch.int32)
    index_S = layout.rank_indices(torch.device("cpu"))
    is_padding = index_S.int() >= rank_K[:, None]
    before = [torch.randn(3, layout.size).masked_fill(is_padding, 0).abs() for _ in range(4)]
    steps = Update(is_first=True, number=3, learning_rate=1e-2, weight_decay=0.1, max_norm=0.3)
    factors = torch.tensor([steps.factors(), NOTHING.factors(), steps.factors()])
    norm, work = before[3].norm(dim=1, keepdim=True), torch.zeros(3, layout.size)
    plain, there = ([x.clone().to(d) for x in (*before[:3], norm)] for d in ("cpu", DEVICE))
    found = work.to(DEVICE)
    adamw(plain, work, before[3], factors, None)
    triton_kernels.adamw(
        there, found, before[3].to(DEVICE), factors.to(DEVICE), Used.of(index_S.to(DEVICE), rank_K.to(DEVICE))
    )
    for one, other in zip([*plain, work[[0, 2]]], [*there, found[[0, 2]]], strict=True):
        assert torch.allclose(one, other.cpu(), atol=1e-6)
    assert torch.equal(there[0][1].cpu(), before[0][1])
