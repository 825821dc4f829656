"""Frozen weights are bitsandbytes' own, also where their quantised scales are looked up for several at once."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from llama_lab.engine.frozen import Frozen
from llama_lab.engine.pieces import Pieces


def quantised(sizes, *, double_quant):
    """Layers of 256 inputs whose weights differ in size, so that their scales do."""
    layers = []
    for i, size in enumerate(sizes):
        torch.manual_seed(i)
        layer = Linear4bit(256, size, bias=False, compress_statistics=double_quant, quant_type="nf4")
        layer.weight.data.mul_(10.0**i)
        layers.append(layer.to("cpu"))
    return layers


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_bitsandbytes_own(double_quant):
    layers = quantised([64, 128, 192], double_quant=double_quant)
    wanted = torch.cat([dequantised(layer) for layer in layers])
    frozen = Frozen(layers, Pieces(compiled=False), keep=False)
    assert (frozen.nested is not None) is double_quant
    assert torch.equal(frozen.weight(), wanted)
    assert all(
        torch.equal(dequantised(layer), part) for layer, part in zip(layers, wanted.split([64, 128, 192]), strict=True)
    )


def test_scales_that_do_not_fill_blocks_are_left_to_bitsandbytes():
    layers = quantised([64, 96], double_quant=True)
    wanted = torch.cat([dequantised(layer) for layer in layers])
    frozen = Frozen(layers, Pieces(compiled=False), keep=False)
    assert frozen.nested is None
    assert torch.equal(frozen.weight(), wanted)


def test_held_weights_are_dequantised_once():
    frozen = Frozen(quantised([64], double_quant=True), Pieces(compiled=False), keep=False)
    with frozen.held():
        assert frozen.weight() is frozen.weight()
    assert frozen.weight() is not frozen.weight()


def dequantised(layer):
    """By bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
