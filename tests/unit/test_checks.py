"""The table of what can be combined is true: what is allowed trains, and what is refused really fails in the libraries.

A refusal that no longer fails here can be dropped from llama_lab/checks.py.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from peft.tuners.lora import LoraLayer

from llama_lab.checks import check_layers
from llama_lab.choices import Engine, QuantType
from llama_lab.compose import compose_words
from llama_lab.config import LLAMA_LINEAR, GenerationSettings, LoraSettings
from llama_lab.data.splits import build_splits
from llama_lab.errors import ConfigError
from llama_lab.evaluate import held_out_loss
from llama_lab.events import Listeners
from llama_lab.generate import answer
from llama_lab.lora import add_adapter
from llama_lab.results import OBJECTIVES
from llama_lab.trainer import fit
from llama_lab.training import FitSettings

VARIANTS = {
    "plain": [],
    "rslora": ["use_rslora=true"],
    "dora": ["use_dora=true"],
    "olora": ["init=olora"],
    "gaussian": ["init=gaussian"],
    "pissa": ["init=pissa"],
    "orthogonal": ["init=orthogonal"],
    "embed_tokens": ["modules_to_save=[embed_tokens]"],
    "lm_head": ["modules_to_save=[lm_head]"],
    "layer 0, a list": ["layers_to_transform=[0]", "target_modules=[q_proj,v_proj]"],
    "layer 0, all-linear": ["layers_to_transform=[0]"],
    "bias": ["bias=all"],
    "dora, olora": ["use_dora=true", "init=olora"],
    "dora, pissa": ["use_dora=true", "init=pissa"],
}
"""Settings of lora.* that are tried on every quant type."""

PISSA = (ConfigError, "Please initialize PiSSA under float32, float16, or bfloat16")
ORTHOGONAL = (RuntimeError, "Only Tensors of floating point and complex dtype can require gradients")
LAYERS = (ConfigError, "`layers_to_transform` cannot be used when `target_modules` is a str")
# On a CPU, PEFT puts an int8 weight into a new parameter to read its norm, and bitsandbytes' scales are lost on the way
# (dequantize_module_weight of peft/utils/integrations.py): the first forward works, the second does not. On an H100 the
# combination trains.
DORA_INT8 = (AttributeError, "'NoneType' object has no attribute")

QUANTISED = ("nf4", "fp4", "int8")
REFUSED = (
    {(quant, variant): PISSA for quant in QUANTISED for variant in ("pissa", "dora, pissa")}
    | {(quant, "orthogonal"): ORTHOGONAL for quant in QUANTISED}
    | {(quant, "layer 0, all-linear"): LAYERS for quant in QuantType}
    | {("int8", "dora"): DORA_INT8, ("int8", "dora, olora"): DORA_INT8}
)
"""(quant type, variant) -> what the library raises when the check is passed by."""

ALLOWED = [(str(quant), variant) for quant in QuantType for variant in VARIANTS if (quant, variant) not in REFUSED]


def words_of(quant: str, variant: str) -> list[str]:
    return ["model=tiny", f"quant={quant}", *(f"lora.{word}" for word in VARIANTS[variant])]


def lora_of(variant: str) -> LoraSettings:
    """The settings of a variant, whether or not check_combination would let them through."""
    words = OmegaConf.from_dotlist(["r=4", "dropout=0", *VARIANTS[variant]])
    return cast(LoraSettings, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoraSettings), words)))


def train_two_steps(base: Any, lora: LoraSettings) -> dict[str, torch.Tensor]:
    """Measure as a run does before training, take two steps, and return the gradient of every trained tensor.

    Two, because B starts as zero: A gets its first gradient in the second.
    """
    model = add_adapter(base, lora, seed=0)
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return {name: p.grad for name, p in trained.items()}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MatMul8bitLt")  # a line for every product
        yield


# The table


@pytest.mark.parametrize(("quant", "variant"), ALLOWED)
def test_allowed_combination_trains_every_tensor(tiny_base, quant, variant):
    compose_words(words_of(quant, variant))
    gradients = train_two_steps(tiny_base(quant), lora_of(variant))
    assert gradients
    assert [name for name, grad in gradients.items() if grad is None or not torch.isfinite(grad).all()] == []
    assert [name for name, grad in gradients.items() if not grad.any()] == []


@pytest.mark.parametrize("variant", sorted({variant for _, variant in ALLOWED}))
def test_adapter_lies_where_the_settings_say(tiny_base, variant):
    lora = lora_of(variant)
    model = add_adapter(tiny_base(), lora, seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    targets = LLAMA_LINEAR if lora.target_modules == "all-linear" else lora.target_modules
    layers = lora.layers_to_transform or [0, 1]
    adapted = {(int(name.split(".layers.")[1][0]), t) for name in names for t in targets if f".{t}.lora_A" in name}
    assert adapted == {(layer, target) for layer in layers for target in targets}
    assert sum("lora_magnitude_vector" in name for name in names) == (len(adapted) if lora.use_dora else 0)
    assert [name.split(".modules_to_save")[0].split(".")[-1] for name in names if "lora_" not in name] == (
        lora.modules_to_save
    )


@pytest.mark.parametrize(("variant", "scale"), [("plain", 16 / 4), ("rslora", 16 / 4**0.5), ("dora", 16 / 4)])
def test_update_is_scaled_as_the_settings_say(tiny_base, variant, scale):
    model = add_adapter(tiny_base(), lora_of(variant), seed=0)
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {scale}


@pytest.mark.parametrize(("quant", "variant"), REFUSED)
def test_refused_combination_is_refused_before_anything_is_loaded(quant, variant):
    with pytest.raises(ConfigError, match="Type "):
        compose_words(words_of(quant, variant))


@pytest.mark.parametrize(("quant", "variant"), REFUSED)
def test_refused_combination_really_fails(tiny_base, quant, variant):
    error, said = REFUSED[quant, variant]
    if REFUSED[quant, variant] is DORA_INT8 and torch.cuda.is_available():
        pytest.skip("it fails on a CPU alone")
    with pytest.raises(error, match=said):
        train_two_steps(tiny_base(str(quant)), lora_of(variant))


def test_loftq_without_a_gpu_is_refused(tiny_base):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    lora = compose_words(["model=tiny", "lora=loftq", "quant=none"]).lora
    with pytest.raises(ConfigError, match=r"lora.init=loftq computes on a GPU, and none is here"):
        add_adapter(tiny_base(), lora, seed=0)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_start_of_the_adapter_depends_on_the_seed_alone(tiny_base, quant):
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = add_adapter(tiny_base(quant), lora_of("plain"), seed=seed)
        return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}

    first = start(0)
    torch.rand(7)  # the generator stands elsewhere now
    again, other = start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# Words that need no library to be refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset.format=text", "dataset.metrics=[]", "dataset.loss_on=completion"], "Type dataset.loss_on=all"),
        (["dataset.format=text", "dataset.metrics=[]", "dataset.loss_on=assistant"], "Type dataset.loss_on=all"),
        (["dataset.format=text"], r"Type dataset.metrics=\[\] for text"),
        (["objective=eval_los"], "Did you mean eval_loss"),
        (["objective=exact_match", "dataset.metrics=[]"], r"Type dataset.metrics=\[exact_match\]"),
        (["model.chat_template=lama2"], "Did you mean llama2"),
    ],
)
def test_settings_that_clash_are_refused_with_what_to_type(words, said):
    with pytest.raises(ConfigError, match=said):
        compose_words(["model=tiny", *words])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_can_be_chosen(objective):
    pairs = ["trainer=dpo", "dataset=sample_preference"] if objective.startswith("reward_") else []
    prompts = ["trainer=grpo", "dataset=sample_rewards"] if objective == "reward" else []
    assert compose_words(["model=tiny", f"objective={objective}", *pairs, *prompts]).objective == objective


# TRL


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "model.norm"])
def test_module_that_is_saved_is_trained_by_trl(tiny_base, tiny_tokenizer, tmp_path, module, compute):
    """TRL computes the loss from lm_head.weight itself, so an adapter there is refused; a trained copy is read."""
    data = ["dataset.max_train_rows=4", "dataset.max_eval_rows=1", "trainer.per_device_train_batch_size=2"]
    config = compose_words(
        ["model=tiny", *data, "trainer.max_steps=2", "trainer.save_steps=0", "trainer.optim=adamw_torch"]
    )
    model = add_adapter(tiny_base("nf4", compute), LoraSettings(r=4, modules_to_save=[module]), seed=0)
    (wrapper,) = (m for name, m in model.named_modules() if name.endswith(module))
    before = wrapper.modules_to_save.default.weight.detach().clone()
    splits = build_splits(config.dataset, tiny_tokenizer, seed=0)
    settings = FitSettings(
        trainer=config.trainer,
        seed=0,
        checkpoints=tmp_path / "checkpoints",
        autocast_bf16=False,
        engine=Engine.standard,
    )
    fit(model, tiny_tokenizer, splits.train.tokens, settings, Listeners(), dict)
    assert not torch.equal(wrapper.modules_to_save.default.weight.to(before.dtype), before)
    assert wrapper.modules_to_save.default.weight.dtype is torch.float32
    assert torch.equal(wrapper.original_module.weight, before)
    assert math.isfinite(held_out_loss(model, tiny_tokenizer, splits.valid, 1))
    greedy = GenerationSettings(max_new_tokens=2, do_sample=False)
    assert len(answer(model, tiny_tokenizer, [[{"role": "user", "content": "Train it."}]], greedy)) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["lora.target_modules=[q_proj]", "lora.layers_to_transform=[0,99]"],
        ["lora.target_modules=[model.layers.99.self_attn.q_proj]"],
    ],
)
def test_layers_that_the_model_does_not_have(words):
    config = compose_words(["model=tiny", *words])
    key = words[-1].partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key} names layer 99, and the model has layers 0 to 1"):
        check_layers(config.lora, 2)
    check_layers(config.lora, 100)
