"""Merged layer by layer, an adapter of any kind gives the logits that PEFT gives with it on the whole base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama_lab.choices import DataFormat, LossOn
from llama_lab.data.templates import IGNORED, encode
from llama_lab.errors import ModelError

CHATS = [[{"role": "user", "content": "Say " + "a" * n}, {"role": "assistant", "content": "b" * 9}] for n in (3, 20)]

KINDS = {
    "plain": ("none", {"target_modules": "all-linear"}),
    "nf4": ("nf4", {"target_modules": "all-linear"}),
    "int8": ("int8", {"target_modules": "all-linear"}),
    "dora on nf4": ("nf4", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rslora": ("fp4", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "pissa": ("none", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "one layer": ("nf4", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "ranks by layer": (
        "none",
        {
            "target_modules": ["v_proj", "q_proj"],
            "rank_pattern": {"layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 40},
        },
    ),
    "whole modules": (
        "nf4",
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]},
    ),
}


def make_adapter(base, folder: Path, kwargs) -> None:
    """Save an adapter with something in all of its weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **kwargs))
    is_pissa = kwargs.get("init_lora_weights") == "pissa"
    for name, weight in model.named_parameters():
        if weight.requires_grad and not (is_pissa and "lora_A" in name):
            weight.data += torch.randn_like(weight) * 0.05
    model.save_pretrained(str(folder), save_embedding_layers=False)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_adapter_on_its_base(kind, tiny_base, tiny_tokenizer, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llama_lab.data.batches import Collator
    from llama_lab.take import merging
    from llama_lab.take.fidelity import Prompts
    from llama_lab.take.options import Onto, OutDtype
    from llama_lab.take.source import open_source
    from llama_lab.take.weights import adapter_parts, base_files

    quant, kwargs = KINDS[kind]
    make_adapter(tiny_base(quant), tmp_path / "adapter", kwargs)
    words = ["model=tiny", f"quant={quant}", "quant.compute_dtype=float32", "quant.double_quant=false"]
    source = open_source(tmp_path / "adapter", words)
    rows = [encode({"messages": chat}, tiny_tokenizer, LossOn.completion) for chat in CHATS]
    batch = Collator(pad_token_id=tiny_tokenizer.pad_token_id)(rows)
    batch["targets"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    monkeypatch.setattr(merging, "GROUP_BYTES", 1)  # one layer at a time
    merger = merging.Merger(
        source=source,
        base=base_files(source.config.model),
        parts=adapter_parts(source.adapter, source.peft),
        dtype=OutDtype.fp32,
        prompts=Prompts(batches=[batch]),
        work=tmp_path,
        tick=lambda what: None,
    )
    onto = Onto.original if quant == "none" else Onto.dequantised
    found = merger.measure([onto])[onto]
    (tmp_path / "merged").mkdir()
    merger.write(tmp_path / "merged", onto)
    assert merger.check(tmp_path / "merged") == found

    whole = PeftModel.from_pretrained(tiny_base(quant), str(tmp_path / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        wanted, given = (model(**inputs).logits[batch["targets"] != IGNORED] for model in (whole, merged))
    atol = 0.05 if quant == "int8" else 1e-4  # int8 rounds its activations, too
    torch.testing.assert_close(given, wanted, atol=atol, rtol=0)
    assert found.max_logit_diff == pytest.approx(float((given - wanted).abs().max()), abs=1e-4)


@pytest.mark.parametrize(
    ("peft", "said"),
    [({"peft_type": "IA3"}, "this adapter is IA3"), ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, "repeats")],
)
def test_what_is_no_plain_lora_is_refused(peft, said, tmp_path):
    from llama_lab.take.weights import adapter_parts

    with pytest.raises(ModelError, match=said):
        adapter_parts(tmp_path, peft)


@pytest.mark.parametrize("modules", [[], ["q_proj"]])
def test_lora_on_a_parameter_is_refused_in_our_own_words(modules, tiny_base, tmp_path):
    from llama_lab.take.weights import adapter_parts

    make_adapter(tiny_base("none"), tmp_path, {"target_modules": modules, "target_parameters": ["gate_proj.weight"]})
    peft = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.gate_proj is on its parameter"):
        adapter_parts(tmp_path, peft)


def test_preferences_are_scored_by_the_reward_of_the_adapter(tiny_base, tiny_tokenizer, tmp_path):
    from peft import PeftModel

    from llama_lab.compose import compose_words
    from llama_lab.data.splits import build_splits
    from llama_lab.take.preferences import score_preferences

    rows = [{"prompt": f"Say {i}", "chosen": "yes " * (i % 3 + 1), "rejected": "no"} for i in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = compose_words(["model=tiny"]).dataset
    dataset.name, dataset.path, dataset.metrics, dataset.eval_fraction = None, str(file), [], 0.5
    dataset.format = DataFormat.preference
    splits = build_splits(dataset, tiny_tokenizer, seed=0, trainer="dpo")
    make_adapter(tiny_base(), tmp_path / "adapter", {"target_modules": "all-linear"})
    model = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "adapter")).eval()
    found = score_preferences(model, tiny_tokenizer, splits.valid, batch_size=3)
    assert 0 <= found["preference_accuracy"] <= 1
    assert found == pytest.approx(score_preferences(model, tiny_tokenizer, splits.valid, batch_size=1), abs=1e-3)
    for weight in model.parameters():
        if weight.ndim == 2 and min(weight.shape) == 4:
            weight.data.zero_()  # the adapter is the base now
    assert score_preferences(model, tiny_tokenizer, splits.valid, batch_size=4)["preference_margin"] == 0
