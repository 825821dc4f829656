"""Whether an adapter fits, from the headers of its files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_lab.config import ModelSettings
from llama_lab.errors import ModelError
from llama_lab.take.fits import check_fits, tensor_shapes
from llama_lab.take.peft_config import check_built, check_config, check_weights

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path):
    save_file({KEY.format(i): torch.zeros(8, 64) for i in range(2)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_an_adapter_of_another_rank_than_its_config_says(adapter):
    check_fits(adapter, {"r": 8}, ModelSettings(name="owner/name"))
    with pytest.raises(ModelError, match=r"says r=4, and 2 matrices have another rank, such as 8 in .*layers\.0\."):
        check_fits(adapter, {"r": 4}, ModelSettings(name="owner/name"))
    check_fits(adapter, {"r": 4, "rank_pattern": {"q_proj": 8}}, ModelSettings(name="owner/name"))


def test_an_adapter_of_more_layers_than_the_base_has(adapter, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"it has at least 2 layers, and .* has 1"):
        check_fits(adapter, {"r": 8}, ModelSettings(name=str(base)))
    check_fits(adapter, {"r": 8, "layer_replication": [[0, 1], [0, 1]]}, ModelSettings(name=str(base)))


PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and llama_lab reads LoRA"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, and must be a positive number"),
        ({"lora_alpha": -3}, "lora_alpha is -3, and must be a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', and must be a positive number"),
        ({"lora_alpha": None}, "lora_alpha is null, and must be a positive number"),
        ({"r": "8"}, "r is '8', and must be a whole number"),
        ({"r": True}, "r is True, and must be a whole number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is .*nan.*, and must be positive numbers"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], and must be whole numbers"),
        ({"target_modules": "(("}, r"target_modules is '\(\(', and must be a list of names"),
        ({"target_modules": []}, r"target_modules is \[\], and must be a list of names"),
        ({"target_parameters": 5}, "target_parameters is 5, and must be a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', and must be a list"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', and must be true or false"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, and must be a text"),
    ],
)
def test_values_that_no_adapter_has_are_named(changed, said):
    check_config(PLAIN, Path("adapter_config.json"))
    with pytest.raises(ModelError, match=said):
        check_config(PLAIN | changed, Path("adapter_config.json"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"target_modules": ["v_proj"]},
            r"has target_modules=\['v_proj'\], and the weights have 2 layers that it leaves",
        ),
        ({"target_modules": ".*v_proj"}, "has target_modules=.*v_proj, and the weights have 2 layers"),
        ({"target_modules": None, "exclude_modules": ["q_proj"]}, "the weights have 2 layers that it leaves out"),
        ({"layers_to_transform": [0]}, r"1 layers that it leaves out, such as model\.layers\.1\.self_attn\.q_proj"),
        ({"layers_to_transform": 0}, r"1 layers that it leaves out, such as model\.layers\.1\.self_attn\.q_proj"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "names lm_head in target_modules, and the weights have no such layer",
        ),
        ({"modules_to_save": ["norm"], "task_type": "CAUSAL_LM"}, "names norm in modules_to_save"),
        ({"use_dora": True}, "says use_dora=True, and the weights have no magnitudes"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 4}}, "says r=4, and 1 matrices have another rank, such as 8"),
    ],
)
def test_weights_of_another_config_are_refused(adapter, changed, said):
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    check_weights(shapes, PLAIN, adapter)
    with pytest.raises(ModelError, match=said):
        check_weights(shapes, PLAIN | changed, adapter)


@pytest.mark.parametrize(
    "targets", ["all-linear", ".*_proj", None, ["model.layers.0.self_attn.q_proj", "1.self_attn.q_proj"]]
)
def test_targets_are_read_as_peft_reads_them(adapter, targets):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    check_weights(shapes, PLAIN | {"target_modules": targets}, adapter)
    if targets not in ("all-linear", None):  # which PEFT replaces before it asks
        config = LoraConfig(target_modules=targets)
        assert all(check_target_module_exists(config, f"model.layers.{i}.self_attn.q_proj") for i in range(2))


@pytest.mark.parametrize(
    "changed",
    [
        {"target_modules": ["q_proj", "query_key_value", "W_pack"]},
        {"modules_to_save": ["embed_token", "wte", "layernorm"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_names_of_which_peft_builds_nothing_are_taken(adapter, changed):
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    whole = {"base_model.model.lm_head.weight": (512, 64)}
    check_weights(shapes | whole, PLAIN | changed, adapter)


def test_a_tied_layer_has_the_lora_of_the_other_one(adapter):
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    tied = {f"base_model.model.{name}.lora_embedding_A": (8, 512) for name in ("model.embed_tokens", "lm_head")}
    changed = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    check_weights(shapes | tied, PLAIN | changed, adapter)
    with pytest.raises(ModelError, match="1 layers that it leaves out, such as lm_head"):
        check_weights(shapes | tied, PLAIN | changed | {"ensure_weight_tying": False}, adapter)


def test_an_adapter_of_parameters_alone_names_no_modules():
    parameters = {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]}
    check_config(PLAIN | parameters, Path("adapter_config.json"))


def test_layers_that_peft_builds_and_the_file_lacks_are_named(adapter):
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    built = [key.replace("lora_A", "lora_A.default") for key in shapes]
    check_built([*built, "base_model.model.model.norm.weight"], shapes, adapter)
    with pytest.raises(ModelError, match=r"covers model\.layers\.7\.self_attn\.q_proj, and the weights have no such"):
        check_built([*built, built[0].replace("layers.0", "layers.7")], shapes, adapter)
    with pytest.raises(ModelError, match=r"leaves model\.layers\.1\.self_attn\.q_proj out, and the weights have it"):
        check_built(built[:1], shapes, adapter)


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"a": 5}', b'{"a": {"data_offsets": []}}', b"[" * 100_000])
def test_a_head_that_is_none_is_a_file_that_is_not_whole(tmp_path, header):
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"more")
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        tensor_shapes(file)


def test_targets_that_are_left_out_need_no_weights(adapter):
    shapes = tensor_shapes(adapter / "adapter_model.safetensors")
    left_out = {"target_modules": ["q_proj", "model.layers.0.mlp.down_proj"], "exclude_modules": ["down_proj"]}
    check_weights(shapes, PLAIN | left_out, adapter)


def test_a_few_trained_tokens_are_no_other_vocabulary(tmp_path):
    tokens = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 64)}
    save_file({KEY.format(0): torch.zeros(8, 64)} | tokens, tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1}))
    check_fits(tmp_path, PLAIN, ModelSettings(name=str(tmp_path)))
