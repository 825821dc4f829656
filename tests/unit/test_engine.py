"""The fast engine computes what PEFT and transformers compute: values, gradients, and what it leaves to them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from llama_lab.data.batches import Collator
from llama_lab.data.templates import IGNORED
from llama_lab.engine.attention import Attend
from llama_lab.engine.install import TAKES_ROWS, speed_up
from llama_lab.engine.layers import HeadLoss, RmsNorm, Rotate, SwiGlu
from llama_lab.engine.projection import Part, Project
from llama_lab.loss import summed_loss


def numbers(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_projection_has_the_right_gradients(dropout, with_bias):
    parts = [
        Part(size=5, rank=2, scale=0.5, dropout=dropout),
        Part(size=3),  # no LoRA on this one
        Part(size=4, rank=3, scale=2.0),
    ]
    a, b = [numbers(2, 6), numbers(3, 6)], [numbers(5, 2), numbers(4, 3)]
    weight, bias = numbers(12, 6, grad=False), numbers(12, grad=False) if with_bias else None

    def project(x, *lora):
        torch.manual_seed(1)  # the same mask every time
        return Project.apply(x, weight, bias, parts, *lora)

    assert gradcheck(project, (numbers(7, 6), *a, *b))


def test_dropout_leaves_out_the_share_it_names_and_keeps_the_mean():
    x, a, b = torch.ones(2000, 50), torch.ones(1, 50) / 50, torch.ones(1, 1)
    y = Project.apply(x, torch.zeros(1, 50), None, [Part(size=1, rank=1, dropout=0.3)], a, b)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert y.std().item() == pytest.approx((0.3 / 0.7 / 50) ** 0.5, rel=0.1)


def test_layers_have_the_right_gradients():
    assert gradcheck(lambda x: RmsNorm.apply(x, torch.arange(1.0, 7).double(), 1e-5), (numbers(3, 6),))
    assert gradcheck(SwiGlu.apply, (numbers(3, 8),))
    angles = torch.rand(3, 1, 2, dtype=torch.float64).repeat(1, 1, 2)
    assert gradcheck(lambda x: Rotate.apply(x, angles.cos(), angles.sin()), (numbers(3, 2, 4),))


@pytest.mark.parametrize("chunk", [2, 5, 100])
def test_loss_of_the_head_has_the_right_value_and_gradient(chunk):
    hidden, head, targets = numbers(5, 4), numbers(9, 4, grad=False), torch.tensor([0, 8, 3, 3, 1])
    wanted = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    torch.testing.assert_close(HeadLoss.apply(hidden, head, targets, chunk), wanted)
    assert gradcheck(lambda h: HeadLoss.apply(h, head, targets, chunk), (hidden,))
    assert HeadLoss.apply(hidden[:0], head, targets[:0]) == 0


def test_attention_is_that_of_each_row_alone():
    rows = [(0, 4), (4, 5), (5, 8)]
    q, k, v = numbers(8, 6, 4), numbers(8, 2, 4), numbers(8, 2, 4)
    found = Attend.apply(q, k, v, rows, 0.5)
    for start, end in rows:
        one, keys, values = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            one, keys, values, is_causal=True, scale=0.5, enable_gqa=True
        )
        torch.testing.assert_close(found[start:end], wanted[0].transpose(0, 1))
    assert gradcheck(lambda *qkv: Attend.apply(*qkv, rows, 0.5), (q, k, v))


def adapted(base, **lora):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.05)  # zero in the beginning, where much cannot be seen
    return model


def batch():
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [IGNORED, *range(4, 3 + n)]} for n in (9, 4, 17)]
    return Collator(pad_token_id=0)(rows)


def step(model):
    model.zero_grad()
    loss, learned = summed_loss(model, **batch())
    loss.backward()
    return loss.detach() / learned, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(one, other):
    (loss, grads), (wanted_loss, wanted) = step(one), step(other)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=1e-6)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-4, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj", "up_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    ],
    ids=["all", "q,v", "o,up", "rslora", "patterns"],
)
def test_step_is_that_of_peft(tiny_base, quant, lora):
    base = tiny_base(quant)
    model = adapted(base, **lora)
    torch.manual_seed(0)
    twin = copy.deepcopy(model) if quant == "none" else adapted(tiny_base(quant), **lora)
    twin.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    assert speed_up(model) > 0
    assert_same_step(model, twin)


def test_longer_rows_and_checkpointing_give_the_same_step(tiny_base, monkeypatch):
    model = adapted(tiny_base())
    twin = copy.deepcopy(model)
    speed_up(model)
    monkeypatch.setattr("llama_lab.loss.MAX_LENGTH", 16)
    assert_same_step(model, twin)
    for one in (model, twin):
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one.train()
    assert_same_step(model, twin)


@pytest.mark.parametrize(
    ("lora", "num_left"),
    [({"use_dora": True}, 0), ({"lora_bias": True}, 0), ({"modules_to_save": ["lm_head"]}, 8), ({"bias": "all"}, 8)],
    ids=["dora", "lora_bias", "modules_to_save", "bias"],
)
def test_what_is_more_than_plain_lora_is_left_to_peft(tiny_base, lora, num_left):
    model = adapted(tiny_base(), **lora)
    twin = copy.deepcopy(model)
    assert speed_up(model) == num_left
    assert_same_step(model, twin)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_of_the_base_are_trained_where_they_are_to_be(bias):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, attention_bias=True, mlp_bias=True))
    model = adapted(base, bias=bias)
    twin = copy.deepcopy(model)
    assert speed_up(model) == (4 if bias == "none" else 0)
    assert_same_step(model, twin)


def test_switched_off_merged_or_other_adapters_are_peft_s(tiny_base):
    model = adapted(tiny_base())
    ids = batch()["input_ids"]
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    own = model(input_ids=ids).logits
    speed_up(model)
    torch.testing.assert_close(model(input_ids=ids).logits, own)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    torch.testing.assert_close(model(input_ids=ids).logits, plain)  # its B is zero


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_those_of_peft(tiny_base, attention):
    model = adapted(tiny_base())
    model.get_base_model().set_attn_implementation(attention)
    data = batch()
    asked = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    wanted = model.generate(**asked, max_new_tokens=8, do_sample=False)
    speed_up(model)
    assert torch.equal(model.generate(**asked, max_new_tokens=8, do_sample=False), wanted)


def test_weights_that_share_an_input_lie_there_once(tiny_base):
    model = adapted(tiny_base())
    speed_up(model)
    attention = next(module for module in model.modules() if isinstance(module, LlamaAttention))
    q, k = (layer.get_base_layer().weight for layer in (attention.q_proj, attention.k_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert model in TAKES_ROWS
