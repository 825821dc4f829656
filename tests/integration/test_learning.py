"""A run learns, on right gradients, whatever was measured before it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llama_lab.compose import compose_words
from llama_lab.lora import add_adapter
from llama_lab.loss import summed_loss
from llama_lab.model import load_base

from .conftest import TINY, read_json


@pytest.fixture(autouse=True)
def cache(environment, monkeypatch):
    monkeypatch.setenv("LLAMA_LAB_CACHE", environment["LLAMA_LAB_CACHE"])


def batch():
    ids = torch.arange(3, 67).view(2, 32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    losses, count = summed_loss(model, **batch())
    (losses / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "none"])
def test_measuring_before_training_does_not_change_the_gradients(quant, dtype):
    config = compose_words(["model=tiny", f"quant={quant}", f"quant.compute_dtype={dtype}", "lora.dropout=0"])
    model = add_adapter(load_base(config.model, config.quant), config.lora, seed=0)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        summed_loss(model, **batch())
        model.generate(input_ids=batch()["input_ids"], max_new_tokens=2, use_cache=True)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_gradients_on_a_quantised_base_are_those_of_the_same_weights_in_fp32():
    config = compose_words(["model=tiny", "quant=nf4", "quant.compute_dtype=float32", "lora.dropout=0"])
    quantised = add_adapter(load_base(config.model, config.quant), config.lora, seed=0)
    plain = add_adapter(load_base(config.model, config.quant).dequantize(), config.lora, seed=0)
    for name, wanted in gradients(plain).items():
        torch.testing.assert_close(gradients(quantised)[name].float(), wanted.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantised_copies_give_the_products_of_bitsandbytes(dtype):
    from bitsandbytes.nn import Linear4bit

    config = compose_words(["model=tiny", "quant=nf4", f"quant.compute_dtype={dtype}", "lora.dropout=0"])
    ours = add_adapter(load_base(config.model, config.quant), config.lora, seed=0)
    theirs = add_adapter(load_base(config.model, config.quant), config.lora, seed=0)
    layers = [module for module in theirs.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        del layer.__dict__["forward"]  # back to bitsandbytes' own
    wanted = gradients(theirs)
    assert [name for name, grad in gradients(ours).items() if not torch.equal(grad, wanted[name])] == []


def test_loss_counts_only_learned_tokens():
    config = compose_words(["model=tiny", "quant=none", "quant.compute_dtype=float32"])
    model = load_base(config.model, config.quant).eval()
    data = batch()
    data["labels"] = data["labels"].clone()
    data["labels"][:, :20] = -100
    data["labels"][1, 25:] = -100
    losses, count = summed_loss(model, **data)
    whole = model(**data).loss  # transformers' own mean over the same tokens
    assert int(count) == 12 + 5
    torch.testing.assert_close(losses / count, whole)


def test_run_on_the_tiny_model_learns(lab, tmp_path):
    words = ["model=tiny", "tracking=none", "dataset.max_train_rows=400", "lora.r=32", "trainer.learning_rate=1e-2"]
    words += ["trainer.num_train_epochs=2", "trainer.save_steps=0", "dataset.metrics=[]", "generation.num_prompts=0"]
    folder = lab.run(tmp_path / "run", *words)
    result = read_json(folder / "result.json")
    assert result["eval_loss_before"] > 5  # ln 320 = 5.77: a model that knows nothing
    assert result["eval_loss"] < result["eval_loss_before"] - 1


def test_fast_engine_learns_what_the_standard_one_does(lab, tmp_path):
    words = [*TINY, "tracking=none", "quant.compute_dtype=float32", "trainer.max_steps=20", "trainer.logging_steps=1"]
    words += ["dataset.metrics=[]", "evaluate.before=false", "generation.num_prompts=0", "lora.dropout=0"]
    fast, standard = (lab.run(tmp_path / e, *words, f"trainer.engine={e}") for e in ("fast", "standard"))
    losses = [[row["train/loss"] for row in metrics(folder) if "train/loss" in row] for folder in (fast, standard)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-6)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (fast, standard))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
