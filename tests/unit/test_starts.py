"""Adapters that begin with numbers drawn before are those that PEFT makes, to the bit."""

import pytest
import torch

from llama_lab.choices import LoraInit
from llama_lab.config import LoraSettings
from llama_lab.lora import add_adapter, add_named_adapter
from llama_lab.stacked.starts import KEPT, Starts, _parameters

FIRST = LoraSettings(r=4)
ALIKE = LoraSettings(r=4, alpha=32.0, dropout=0.3)
OTHERS = [(LoraSettings(r=8), 1), (LoraSettings(r=4), 2), (LoraSettings(r=4, init=LoraInit.gaussian), 1)]


@pytest.fixture
def begun(tiny_base):
    """A model with an adapter whose start is kept, and the same model for PEFT alone."""
    models = [add_adapter(tiny_base(), FIRST, seed=1, name="first") for _ in range(2)]
    starts = Starts()
    starts.keep(models[0], "first", FIRST, seed=1)
    return starts, *models


def same(model, plain, name):
    found, wanted = _parameters(model, name), _parameters(plain, name)
    assert list(found) == list(wanted)
    for key, param in wanted.items():
        assert torch.equal(found[key], param), key
        assert (found[key].dtype, found[key].requires_grad) == (param.dtype, param.requires_grad), key


def drawn(monkeypatch):
    """How often PEFT draws an adapter's numbers, from here on."""
    from peft.tuners.lora.layer import LoraLayer

    draws, plain = [], LoraLayer.reset_lora_parameters

    def counted(layer, name, init):
        if not layer.lora_A[name].weight.is_meta:
            draws.append(name)
        plain(layer, name, init)

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", counted)
    return draws


def test_what_begins_alike_is_drawn_once(begun, monkeypatch):
    starts, model, plain = begun
    for param in _parameters(model, "first").values():
        param.data.add_(1)  # it has been trained since
    draws = drawn(monkeypatch)
    starts.add(model, "second", ALIKE, seed=1)
    after = torch.get_rng_state()
    assert not draws
    add_named_adapter(plain, "second", ALIKE, seed=1)
    assert draws
    assert torch.equal(after, torch.get_rng_state())
    same(model, plain, "second")
    for each in (model, plain):
        each.set_adapter("second")
    same(model, plain, "second")
    assert all(param.requires_grad for param in _parameters(model, "second").values())
    ids = torch.arange(40).view(2, 20) + 3
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize(("lora", "seed"), OTHERS)
def test_what_begins_otherwise_is_drawn(begun, lora, seed):
    starts, model, plain = begun
    starts.add(model, "second", lora, seed=seed)
    add_named_adapter(plain, "second", lora, seed=seed)
    same(model, plain, "second")


def test_the_last_used_are_kept(begun, monkeypatch):
    starts, model, _ = begun
    for number in range(KEPT - 1):
        starts.add(model, f"row{number}", FIRST, seed=10 + number)
    starts.add(model, "used", FIRST, seed=1)
    starts.add(model, "new", FIRST, seed=20)
    draws = drawn(monkeypatch)
    starts.add(model, "again", FIRST, seed=1)
    assert not draws
    starts.add(model, "gone", FIRST, seed=10)
    assert draws
