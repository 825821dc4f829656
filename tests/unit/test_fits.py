"""Whether an adapter fits, from the headers of its files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llama_lab.config import ModelSettings
from llama_lab.errors import ModelError
from llama_lab.take.fits import check_fits

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
