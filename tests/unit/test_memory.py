"""Predicted memory and parameters, against the model on the meta device, what autograd keeps, and measured peaks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import memory as benchmark
from llama_lab.activations import Device
from llama_lab.cards import CARDS, fits, largest_micro_batch, nearest_fit
from llama_lab.choices import QuantType
from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.memory import estimate
from llama_lab.params import SHAPES, ModelShape, count_params, shape_from_config, shape_of
from llama_lab.paths import CONF_DIR

CARD = {card.name: card for card in CARDS}
SETTINGS = [["quant=none"], ["quant=nf4"], ["quant=int8"], ["quant=nf4", "quant.double_quant=false"]]
LORAS = ["attention", "all_linear", "dora", "rslora"]


@cache
def composed(*words: str) -> RunConfig:
    """The run that the words start with TRL's trainer; nobody changes it."""
    return compose_words(["trainer.engine=standard", *words])


def peak(words: list[str], model: str = "llama2_7b", length: int = 1024, device: Device = Device.gpu) -> float:
    """Predicted GiB of the run that the words start."""
    return estimate(SHAPES[model], composed(f"model={model}", *words), length=length, device=device).total


def llama_config(shape: ModelShape):
    """A LlamaConfig of the shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, [f"lora={lora}"]) for name in ("tiny", "smollm2_135m") for lora in LORAS),
        ("llama2_7b", ["lora=all_linear", "lora.r=64"]),
        ("llama2_7b", ["lora=attention"]),
        ("tiny", ["lora=attention", "lora.layers_to_transform=[1]"]),
        ("tiny", ["lora.target_modules=[self_attn.o_proj,layers.1.mlp.up_proj]"]),
        ("tiny", ["lora.modules_to_save=[embed_tokens,lm_head]"]),
        ("tiny", ["lora.modules_to_save=[norm]"]),
        ("smollm2_135m", ["lora.modules_to_save=[lm_head]"]),
    ],
)
def test_parameters_are_those_of_the_real_model(name, words):
    import torch
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    from llama_lab import lora

    settings, shape = composed("model=tiny", "quant=none", *words).lora, SHAPES[name]
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(llama_config(shape)), lora.lora_config(settings))
    assert count_params(shape, settings) == lora.count_params(model)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shape_is_read_from_a_config(name):
    assert shape_from_config(llama_config(SHAPES[name])) == SHAPES[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
def test_shape_of_every_model_choice_is_known(name):
    shape = shape_of(composed(f"model={name}").model)
    assert shape is not None
    assert shape == SHAPES[name.removesuffix("_chat").removesuffix("_instruct")]


def test_shape_of_a_folder_is_its_config(tmp_path):
    llama_config(SHAPES["smollm2_135m"]).save_pretrained(tmp_path)
    model = replace(composed("model=llama2_7b").model, name=str(tmp_path))
    assert shape_of(model) == SHAPES["smollm2_135m"]


def kept_by_autograd(shape: ModelShape, config: RunConfig, tmp_path: Path, length: int) -> int:
    """Bytes of what the blocks' forward pass keeps for backward, weights aside, for one row on the CPU in fp32."""
    import torch
    from transformers import LlamaForCausalLM

    from llama_lab.lora import add_adapter
    from llama_lab.model import load_base

    LlamaForCausalLM(llama_config(shape)).save_pretrained(tmp_path)
    base = load_base(replace(config.model, name=str(tmp_path)), config.quant)
    model = add_adapter(base, config.lora, seed=0).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses apart

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model.model.model(torch.ones((1, length), dtype=torch.long), use_cache=False)
    # what is left beside activations are weights in another form, whose bytes no row's length divides
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in weights]
    return sum(size for size in sizes if size % length == 0)


@pytest.mark.parametrize(
    "words",
    [
        ["quant=none", "lora=all_linear"],
        ["quant=none", "lora=attention", "lora.dropout=0"],
        ["quant=none", "lora=all_linear", "lora.dropout=0.1"],
        ["quant=nf4", "lora=all_linear"],
        ["quant=nf4", "lora=attention"],
        ["quant=none", "lora=attention", "lora.dropout=0", "model.attn_implementation=eager"],
    ],
)
def test_a_block_keeps_what_autograd_keeps(words, tmp_path, model_cache):
    length = 251  # a prime: no weight has so many bytes that it could be taken for an activation
    fp32, one_row = "quant.compute_dtype=float32", "trainer.per_device_train_batch_size=1"
    config = composed("model=llama2_7b", *words, fp32, one_row)
    shapes = [replace(SHAPES["tiny"], num_layers=n) for n in (3, 2)]
    three, two = (kept_by_autograd(shape, config, tmp_path, length) for shape in shapes)
    more = [estimate(s, config, length=length, device=Device.cpu).activations * 2**30 for s in shapes]
    norms = 2 * 4 * length  # the two norms' own factors, four bytes a token each, are too small to be counted
    assert three - two - norms == pytest.approx(more[0] - more[1], abs=1)


@given(
    batch=st.integers(1, 16),
    length=st.integers(64, 4096),
    r=st.integers(1, 256),
    quant=st.sampled_from(SETTINGS),
    lora=st.sampled_from(["attention", "all_linear"]),
    checkpointing=st.booleans(),
)
def test_more_rows_tokens_and_rank_need_more(batch, length, r, quant, lora, checkpointing):
    def gib(batch: int, length: int, r: int) -> float:
        config = composed("model=llama2_7b", *quant, f"lora={lora}")
        t = replace(config.trainer, per_device_train_batch_size=batch, gradient_checkpointing=checkpointing)
        config = replace(config, trainer=t, lora=replace(config.lora, r=r))
        return estimate(SHAPES["llama2_7b"], config, length=length).total

    start = gib(batch, length, r)
    assert gib(batch + 1, length, r) > start
    assert gib(batch, length + 64, r) > start
    assert gib(batch, length, r + 8) > start


@pytest.mark.parametrize("device", list(Device))
@pytest.mark.parametrize("quant", SETTINGS)
def test_parts_sum_to_the_total_and_none_is_negative(quant, device):
    found = estimate(SHAPES["llama2_7b"], composed("model=llama2_7b", *quant), length=512, device=device)
    assert found.total == pytest.approx(sum(found.parts().values()))
    assert min(found.parts().values()) >= 0
    assert set(found.parts()) == {
        "base",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
    }


def test_each_remedy_saves_memory():
    assert peak(["quant=nf4"]) < peak(["quant=nf4", "quant.double_quant=false"]) < peak(["quant=int8"])
    assert peak(["quant=int8"]) < peak(["quant=none"])
    assert peak(["trainer.gradient_checkpointing=true"]) < peak([])
    assert peak(["trainer.optim=paged_adamw_32bit", "lora.r=64"]) < peak(
        ["trainer.optim=adamw_torch_fused", "lora.r=64"]
    )
    assert peak(["trainer.optim=adamw_8bit"]) < peak(["trainer.optim=adamw_torch_fused"])
    assert peak(["trainer.optim=adamw_torch_fused"]) <= peak(["trainer.optim=adamw_torch"])


def test_checkpointing_cannot_drop_what_int8_keeps():
    saved = {
        q: peak([f"quant={q}"]) - peak([f"quant={q}", "trainer.gradient_checkpointing=true"]) for q in ("int8", "nf4")
    }
    assert saved["int8"] < 0.8 * saved["nf4"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama2_7b", ["trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=2"]),
        ("llama2_7b", ["quant=none", "trainer.per_device_train_batch_size=12"]),
        ("llama2_13b", ["quant.double_quant=false", "lora.r=64"]),
        ("llama2_70b", ["quant=int8", "trainer.gradient_checkpointing=true"]),
        ("codellama_7b", ["trainer.micro_batch_size=4", "trainer.per_device_train_batch_size=8"]),
    ],
)
def test_words_of_the_nearest_fit_compose_to_a_run_that_fits(model, words, card):
    words = [f"model={model}", "dataset.max_length=2048", *words]
    config, shape = compose_words(words), SHAPES[model]
    found = nearest_fit(shape, config, card, length=2048)
    before = estimate(shape, config, length=2048, device=card.device)
    assert (found == []) == fits(before, card)
    if found is None:
        assert "70b" in model
        return
    changed = compose_words([*words, *found])
    assert fits(estimate(shape, changed, length=changed.dataset.max_length, device=card.device), card)
    assert changed.trainer.effective_batch_size == config.trainer.effective_batch_size


def test_the_least_harmful_change_comes_first():
    shape, card = SHAPES["llama2_7b"], CARD["RTX 3090 24 GB"]

    def words(*more: str, length: int = 1024) -> list[str] | None:
        return nearest_fit(shape, composed("model=llama2_7b", *more), card, length=length)

    rows = words("trainer.per_device_train_batch_size=8")
    assert rows == ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"]
    assert words("trainer.per_device_train_batch_size=1", length=4096) == ["trainer.gradient_checkpointing=true"]
    one_row = ["trainer.per_device_train_batch_size=1", "trainer.gradient_checkpointing=true"]
    assert words("quant=none", *one_row, length=16384) == ["quant=nf4"]
    shorter = words("quant=none", "lora=pissa", *one_row, length=16384)
    assert shorter is not None  # pissa needs the weights as they are
    assert [word.split("=")[0] for word in shorter] == ["dataset.max_length"]


@given(rows=st.integers(1, 64), accumulation=st.integers(1, 4), memory_gib=st.floats(4, 80))
def test_largest_micro_batch_divides_fits_and_cannot_grow(rows, accumulation, memory_gib):
    config, shape = composed("model=llama2_7b"), SHAPES["llama2_7b"]
    t = replace(config.trainer, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    config = replace(config, trainer=t)
    found = largest_micro_batch(shape, config, memory_gib=memory_gib, length=512)

    def fits_at(size: int) -> bool:
        changed = replace(config, trainer=config.trainer.with_micro_batch(size))
        return estimate(shape, changed, length=512).total <= 0.9 * memory_gib

    total = rows * accumulation
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    assert found == max((n for n in divisors if fits_at(n)), default=None)


@pytest.mark.parametrize("row", benchmark.read_rows(), ids=lambda row: row["case"].removeprefix("model="))
def test_prediction_is_near_the_measured_peak(row):
    limit = benchmark.TARGET_ERROR if row["on_gpu"] else 0.15  # resident memory holds what the allocator keeps, too
    assert abs(benchmark.error_of(row)) <= limit


def test_enough_settings_were_measured_on_a_gpu():
    rows = [row for row in benchmark.read_rows() if row["on_gpu"]]
    assert len(rows) >= 14
    assert {row["settings"][1] for row in rows} == {f"quant={kind}" for kind in QuantType}
    assert all("H100" in row["card"] and row["versions"]["torch"] for row in rows)


def test_check_fails_where_a_prediction_is_off(capsys):
    rows = benchmark.read_rows()
    assert benchmark.check(rows) == 0
    wrong = rows[0] | {"peak_memory_gib": 1.2 * rows[0]["peak_memory_gib"]}
    assert benchmark.check([wrong]) == 1
    assert "1 of the cases" in capsys.readouterr().out


def test_nothing_imports_torch():
    code = "import sys, llama_lab.cards; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no Linux that lets a process forget its peak"
)
def test_what_comes_next_has_a_peak_of_its_own():
    said = "import torch; from llama_lab.training import forget_peak, peak_memory_gib as peak; x = torch.ones(2**28)\n"
    said += "high = peak(); del x; forget_peak(); print(high - peak())"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, env=os.environ | hidden)
    assert float(done.stdout) > 0.8, done.stderr
