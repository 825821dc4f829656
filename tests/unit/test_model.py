"""What loading a base does beside loading it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from llama_lab.backend import OwnBackend
from llama_lab.compose import compose_words
from llama_lab.config import ModelSettings
from llama_lab.errors import ConfigError, ModelError
from llama_lab.model import base_shape, context_of, load_base
from llama_lab.plan import planned

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
def test_models_that_are_built_otherwise_are_refused_and_plan_says_so(config, said, tiny_tokenizer, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    run = compose_words(["model=llama2_7b", f"model.name={tmp_path}", "quant=none", "dataset.max_train_rows=8"])
    with pytest.raises(ModelError, match=said) as refused:
        _ = base_shape(run.model), load_base(run.model, run.quant)
    assert str(refused.value) in [finding.message for finding in planned(run).findings if finding.check == "base"]


@pytest.mark.parametrize(
    ("places", "rope", "context"),
    [
        (4096, {"rope_type": "linear", "factor": 2.0}, 8192),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (65536, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}, 65536),
    ],
)
def test_places_that_a_rotation_stretches_are_counted(places, rope, context, tmp_path):
    config = LlamaConfig(max_position_embeddings=places, rope_parameters=rope | {"rope_theta": 10_000.0})
    config.save_pretrained(tmp_path)
    assert context_of(ModelSettings(name=str(tmp_path))) == context


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these kernels")
@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_that_does_not_train_here_is_named_with_the_one_that_does(kind, tiny_tokenizer):
    run = compose_words(["model=tiny", f"model.attn_implementation={kind}"])
    with pytest.raises(ConfigError, match=rf"attn_implementation={kind} .* Type model\.attn_implementation=sdpa\."):
        OwnBackend().adapted(run, tiny_tokenizer)
