"""Which runs the fast engine of a GPU takes, how much memory it takes for them, and which level auto chooses."""

import json
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed_gpu import RESULTS
from llama_lab.activations import Device
from llama_lab.choices import Engine, Memory
from llama_lab.compose import compose_words
from llama_lab.engine.choose import choose, lacking_for_triton, unsuited_model
from llama_lab.engine.suits import allowed_memory, unsuited
from llama_lab.memory import estimate, estimate_fast, fastest_fit, is_fast
from llama_lab.params import SHAPES

SEVEN = SHAPES["llama2_7b"]


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["quant=int8"], "quant.type=int8"),
        (["quant.compute_dtype=float16"], "quant.compute_dtype=float16"),
        (["lora=dora"], "lora.use_dora=true"),
        (["lora.bias=all"], "lora.bias=all"),
        (["quant=none", "lora.modules_to_save=[lm_head]"], "lora.modules_to_save"),
        (["trainer.optim=paged_adamw_8bit"], "trainer.optim=paged_adamw_8bit"),
        (["trainer.neftune_noise_alpha=5"], "trainer.neftune_noise_alpha"),
        (["trainer.bf16=false"], "trainer.bf16=false"),
        (["experiment=seed_guanaco"], "quant.compute_dtype=float16"),
        ([], None),
        (["quant=fp4", "lora=rslora", "trainer.optim=paged_adamw_32bit"], None),
        (["quant=none", "trainer.gradient_checkpointing=true"], None),
    ],
)
def test_settings_that_it_leaves_to_trl_are_named(words, setting):
    config = compose_words(["model=llama2_7b", *words])
    assert unsuited(config) == setting
    assert is_fast(config, Device.gpu) is (setting is None)


def test_the_standard_engine_is_taken_where_it_is_asked_for():
    config = compose_words(["trainer.engine=standard"])
    assert choose(config).engine is Engine.standard
    assert not is_fast(config, Device.gpu)
    assert not is_fast(compose_words([]), Device.cpu)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({}, None),
        ({"target_modules": ["q_proj", "v_proj"]}, None),
        ({"use_dora": True}, "plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "plain LoRA"),
        ({"alpha_pattern": {"up_proj": 2}}, "plain LoRA"),
        ({"rank_pattern": {"down_proj": 2}}, None),  # alone with its input
    ],
)
def test_models_that_it_leaves_to_trl_are_named(tiny_base, lora, reason):
    model = get_peft_model(tiny_base(), LoraConfig(**{"r": 4, "target_modules": "all-linear"} | lora))
    found = unsuited_model(model)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("kind", "is_left"), [("dynamic", True), ("longrope", True), ("linear", False)])
def test_positions_that_depend_on_the_longest_row_are_left_to_trl(kind, is_left):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, rope_parameters=rope))
    found = unsuited_model(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    assert kind in found if is_left else found is None


def measured():
    rows = json.loads(RESULTS.read_text())["rows"]
    return [row for row in rows if row["system"] == "llama_lab" and "peak_memory_gib" in row]


@pytest.mark.parametrize("row", measured(), ids=lambda row: row["case"])
def test_predicted_memory_is_what_a_gpu_measured(row):
    config = compose_words(["model=llama2_7b", "dataset.packing=true", *row["settings"]])
    found = estimate(SEVEN, config, length=config.dataset.max_length).total
    assert found == pytest.approx(row["peak_memory_gib"], rel=0.06)
    assert found > 0.99 * row["peak_memory_gib"]


def test_auto_takes_the_fastest_level_that_fits():
    config = compose_words(["model=llama2_7b", "trainer.per_device_train_batch_size=4"])

    def level(room):
        return fastest_fit(SEVEN, config, length=512, room_gib=room)

    totals = {memory: estimate_fast(SEVEN, config, memory, length=512).total for memory in allowed_memory(config)}
    assert list(totals) == [Memory.fast, Memory.balanced, Memory.lean]
    assert totals[Memory.lean] < totals[Memory.balanced] < totals[Memory.fast]
    for memory, total in totals.items():
        assert level(total + 0.01) is memory
    assert level(totals[Memory.fast] - 0.01) is Memory.balanced
    assert level(0) is Memory.lean
    asked = replace(config, trainer=replace(config.trainer, memory=Memory.balanced))
    assert fastest_fit(SEVEN, asked, length=512, room_gib=0) is Memory.balanced
    checkpointing = replace(config, trainer=replace(config.trainer, gradient_checkpointing=True))
    assert allowed_memory(checkpointing) == (Memory.lean,)


def test_what_triton_needs_is_looked_for_before_a_kernel_is(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in (lacking_for_triton() or "")
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert lacking_for_triton() is None


def test_without_triton_the_package_is_named(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    assert "pip install triton" in (lacking_for_triton() or "")
