"""Preference rows as tokens, what their trainers are told, and what is refused before anything is loaded."""

import json

import pytest
import torch

from llama_lab.choices import LongRows, TrainerName
from llama_lab.compose import compose_words
from llama_lab.data.answers import encode_answers, fit_answers
from llama_lab.data.batches import Collator
from llama_lab.data.splits import build_splits
from llama_lab.data.templates import IGNORED, encode_prompt
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import LlamaLabError
from llama_lab.preference_batches import PairCollator, SideCollator, SingleCollator, single_answers

DPO = ["model=tiny", "trainer=dpo", "dataset=sample_preference"]
ASK = [{"role": "user", "content": "Which?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def pairs(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"number {i}", "chosen": f"good {i}", "rejected": f"wrong {i}!"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = DatasetSettings(path=str(tmp_path / "rows.jsonl"))
    return build_splits(dataset, tiny_tokenizer, seed=0, trainer=TrainerName.dpo).train.tokens


def test_both_answers_of_a_pair_follow_the_prompt_that_inference_sees(tiny_tokenizer):
    row = encode_answers({"prompt": ASK, "chosen": answer("this"), "rejected": answer("that")}, tiny_tokenizer)
    prompt = encode_prompt(ASK, tiny_tokenizer)
    for ids, labels, text in (("input_ids", "labels", "this"), ("rejected_ids", "rejected_labels", "that")):
        assert row[ids][: len(prompt)] == prompt
        learned = [label for label in row[labels] if label != IGNORED]
        assert tiny_tokenizer.decode(learned).strip() == f"{text} </s>"
        assert learned[-1] == tiny_tokenizer.eos_token_id


def test_a_pair_that_the_cut_makes_equal_is_left_out(tiny_tokenizer):
    row = encode_answers({"prompt": ASK, "chosen": answer("ab"), "rejected": answer("ac")}, tiny_tokenizer)
    longest = len(row["input_ids"])
    assert fit_answers(row, longest, LongRows.cut) == (row, None, 0)
    kept, head, lost = fit_answers(row, longest - 3, LongRows.cut)
    assert (kept, head, lost) == (None, "cut", 6)
    assert fit_answers(row, longest - 1, LongRows.drop) == (None, "dropped", 2 * longest)


def test_pairs_are_batched_better_above_worse(pairs, tiny_tokenizer):
    rows = [pairs[0], pairs[1]]
    batch = PairCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].shape[0] == 4
    for i, row in enumerate([*rows, *[{"input_ids": r["rejected_ids"], "labels": r["rejected_labels"]} for r in rows]]):
        answer_ids = batch["input_ids"][i][batch["completion_mask"][i].bool()].tolist()
        assert answer_ids == [label for label in row["labels"] if label != IGNORED]
    sides = SideCollator(pad_token_id=0)(rows)
    torch.testing.assert_close(sides["chosen_labels"], Collator(pad_token_id=0)(rows)["labels"])


def test_answers_of_pairs_one_by_one_meet_the_prompts_of_their_neighbours(pairs, tiny_tokenizer):
    single = single_answers(pairs)
    assert single["is_good"][:4] == [True, False, True, False]
    assert single[1]["input_ids"] == pairs[0]["rejected_ids"]
    batch = SingleCollator(pad_token_id=0)([single[0], single[3]])
    assert batch["label"].tolist() == [True, False]
    mixed = tiny_tokenizer.decode(batch["KL_input_ids"][0][batch["KL_attention_mask"][0].bool()])
    first, other = (tiny_tokenizer.decode(single[i]["input_ids"]) for i in (0, 3))
    assert mixed == first.partition("[/INST]")[0] + "[/INST]" + other.partition("[/INST]")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer=ppo"], "Type trainer=grpo or trainer=rloo"),
        (["trainer.name=ppo"], "Type trainer=grpo or trainer=rloo"),
        (["trainer=dpo"], "dataset=sample_preference"),
        (["dataset=sample_preference"], "Type trainer=dpo, or dataset=sample"),
        (["trainer.beta=0.2"], "Type trainer=dpo"),
        ([*DPO, "trainer.desirable_weight=2"], "Type trainer=kto"),
        ([*DPO, "trainer.beta=0"], "trainer.beta=0.0 is out of range"),
        ([*DPO, "trainer.beta=null"], "trainer.beta has no value"),
        ([*DPO, "trainer.loss_type=kto"], "is no loss of trainer=dpo"),
        ([*DPO, "trainer.loss_type=exo_pair"], "Type 1e-3"),
        ([*DPO, "trainer.loss_type=sigmod"], "Did you mean trainer.loss_type=sigmoid?"),
        ([*DPO, "dataset.packing=true"], "Type dataset.packing=false"),
        ([*DPO, "dataset.loss_on=all"], "Type dataset.loss_on=auto"),
        ([*DPO, "dataset.long_rows=split"], "Type dataset.long_rows=cut"),
        ([*DPO, "trainer.engine=fast"], "Type trainer.engine=auto"),
        ([*DPO, "quant=none", "lora=pissa"], "Type lora.init=default"),
        ([*DPO, "objective=perplexity"], "Type objective=reward_accuracy, or eval_loss"),
        (["objective=reward_margin"], "Type trainer=dpo"),
        (["trainer=kto", *DPO[2:], "trainer.group_by_length=true"], "Type trainer.group_by_length=false"),
        (["trainer=kto", *DPO[2:], "trainer.per_device_train_batch_size=1"], "Type 2"),
        ([*DPO, "objective=reward"], "Type trainer=grpo|rloo"),
        (["trainer=reward", *DPO[2:], "objective=composes"], "objective=reward_accuracy"),
        (["trainer=reward", *DPO[2:], "trainer.center_rewards_coefficient=-1"], "type 0 or more"),
        (["trainer=reward", *DPO[2:], "trainer.rewards=[length]"], "Type trainer=grpo|rloo"),
    ],
)
def test_what_cannot_work_says_what_to_type(words, said):
    with pytest.raises(LlamaLabError) as caught:
        compose_words(words)
    assert said in str(caught.value)


@pytest.mark.parametrize("trainer", ["dpo", "kto", "orpo"])
def test_rows_of_one_answer_are_refused_for_what_they_lack(tmp_path, trainer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(LlamaLabError, match=r"columns prompt, chosen, rejected\. Type trainer=sft"):
        compose_words([f"trainer={trainer}", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}"])


def test_verdicts_are_for_kto_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    words = ["dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}"]
    assert compose_words(["trainer=kto", *words]).trainer.name is TrainerName.kto
    with pytest.raises(LlamaLabError, match="Type trainer=kto"):
        compose_words(["trainer=orpo", *words])


# model.adapter


@pytest.fixture
def adapter(tmp_path, tiny_base):
    from llama_lab.lora import add_adapter

    lora = compose_words(["model=tiny", "lora.r=4"]).lora
    add_adapter(tiny_base(), lora, seed=0).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_is_named_by_its_folder_or_its_run(adapter):
    for folder in (adapter, adapter.parent):
        assert compose_words([*DPO, f"model.adapter={folder}", "lora.r=4"]).model.adapter == str(folder)


def test_adapter_with_other_settings_says_the_words_that_fit(adapter):
    with pytest.raises(LlamaLabError) as caught:
        compose_words([*DPO, f"model.adapter={adapter}", "lora.target_modules=[q_proj]"])
    assert str(caught.value).endswith("Type lora.r=4 lora.target_modules=all-linear")


def test_adapter_of_another_base_is_refused(adapter):
    lock = {"config": {"model": {"name": "meta-llama/Llama-2-7b-hf"}}}
    (adapter.parent / "run.json").write_text(json.dumps(lock))
    with pytest.raises(LlamaLabError, match="was trained on meta-llama/Llama-2-7b-hf, and the run loads tiny"):
        compose_words([*DPO, f"model.adapter={adapter.parent}", "lora.r=4"])


def test_adapter_that_is_not_there_is_told(tmp_path):
    with pytest.raises(LlamaLabError, match=r"is not there\. Name the folder of a finished run"):
        compose_words([*DPO, f"model.adapter={tmp_path / 'none'}"])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(LlamaLabError, match="Finish the run with: python -m llama_lab resume="):
        compose_words([*DPO, f"model.adapter={tmp_path}"])
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LlamaLabError, match="cannot be read"):
        compose_words([*DPO, f"model.adapter={tmp_path}"])


def test_reward_model_does_not_begin_with_an_adapter_that_trained_the_words(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["lm_head"]}))
    words = ["model=tiny", "trainer=reward", "dataset=sample_preference", f"model.adapter={adapter}", "lora.r=4"]
    with pytest.raises(LlamaLabError, match="trained lm_head as well, in whose place a reward model has its score"):
        compose_words([*words, "lora.modules_to_save=[lm_head]", "quant=none"])
