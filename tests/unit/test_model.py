"""What loading a base does beside loading it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config

from llama_lab.compose import compose_words
from llama_lab.errors import ModelError
from llama_lab.model import base_shape, load_base

BERT = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, is_decoder=True)


def test_no_base_is_left_to_cudnn_attention(tiny_base):
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_base()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "of type gpt2, .* has no hidden_size"),
        (BERT, "of type bert, .* has no model.layers"),
    ],
    ids=["gpt2", "bert"],
)
def test_models_that_are_built_otherwise_are_refused(config, said, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run = compose_words(["model=llama2_7b", f"model.name={tmp_path}", "quant=none"])
    with pytest.raises(ModelError, match=said):
        _ = base_shape(run.model), load_base(run.model, run.quant)
