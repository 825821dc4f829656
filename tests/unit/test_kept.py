"""What runs of one process share: rows, and adapters that begin with numbers drawn before, to the bit as of PEFT."""

import pytest
import torch

from llama_lab.compose import compose_words
from llama_lab.lora import add_adapter, add_named_adapter
from llama_lab.model import load_base
from llama_lab.stacked.kept import MAX_STARTS, Kept, _parameters

WORDS = ["model=tiny", "lora.r=4", "seed=1"]
OTHERS = ["lora.r=8", "seed=2", "lora.init=gaussian"]


def config_of(*words):
    return compose_words([*WORDS, *words])


def made(model, name, config):
    """By PEFT alone."""
    add_named_adapter(model, name, config.lora, seed=config.seed)


@pytest.fixture
def begun(tiny_base):
    """A model with an adapter whose start is kept, and the same model for PEFT alone."""
    config = config_of()
    models = [add_adapter(tiny_base(), config.lora, seed=1, name="first") for _ in range(2)]
    kept = Kept()
    kept.remember(models[0], "first", config)
    return kept, *models


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
    kept, model, plain = begun
    alike = config_of("lora.alpha=32", "lora.dropout=0.3", "trainer.learning_rate=1e-3")
    for param in _parameters(model, "first").values():
        param.data.add_(1)  # it has been trained since
    draws = drawn(monkeypatch)
    kept.add_adapter(model, "second", alike)
    after = torch.get_rng_state()
    assert not draws
    made(plain, "second", alike)
    assert draws
    assert torch.equal(after, torch.get_rng_state())
    same(model, plain, "second")
    for each in (model, plain):
        each.set_adapter("second")
    same(model, plain, "second")
    assert all(param.requires_grad for param in _parameters(model, "second").values())
    ids = torch.arange(40).view(2, 20) + 3
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    for param in _parameters(model, "second").values():
        param.data.add_(1)  # a resumed run takes its weights in place
    kept.add_adapter(model, "third", alike)
    made(plain, "third", alike)
    model.set_adapter("second"), plain.set_adapter("second")
    same(model, plain, "third")


@pytest.mark.parametrize("word", OTHERS)
def test_what_begins_otherwise_is_drawn(begun, word):
    kept, model, plain = begun
    kept.add_adapter(model, "second", config_of(word))
    made(plain, "second", config_of(word))
    same(model, plain, "second")


def test_what_peft_rounds_otherwise_begins_otherwise(tiny_base):
    kept = Kept()
    for quant in ("float32", "bfloat16"):
        config = config_of("quant=none", f"quant.compute_dtype={quant}")
        models = [add_adapter(load_base(config.model, config.quant), config.lora, seed=9, name="first") for _ in "12"]
        kept.add_adapter(models[0], "second", config)
        made(models[1], "second", config)
        same(*models, "second")


def test_the_last_used_are_kept(begun, monkeypatch):
    kept, model, _ = begun
    for number in range(MAX_STARTS - 1):
        kept.add_adapter(model, f"row{number}", config_of(f"seed={10 + number}"))
    kept.add_adapter(model, "used", config_of())
    kept.add_adapter(model, "new", config_of("seed=20"))
    draws = drawn(monkeypatch)
    kept.add_adapter(model, "again", config_of())
    assert not draws
    kept.add_adapter(model, "gone", config_of("seed=10"))
    assert draws


def test_runs_on_the_same_rows_load_them_once(model_cache):
    kept = Kept()
    words = ["model=tiny", "dataset=sample", "dataset.max_train_rows=8", "dataset.max_eval_rows=4"]
    first = kept.rows(compose_words([*words, "lora.r=4"]))
    assert kept.rows(compose_words([*words, "lora.r=8", "trainer.learning_rate=1e-3"])) is first
    assert kept.rows(compose_words([*words, "seed=3"])) is not first  # other data sets are split by it
    _, splits, _ = kept.rows(compose_words([*words, "dataset.max_train_rows=6"]))
    assert len(splits.train.tokens) == 6
