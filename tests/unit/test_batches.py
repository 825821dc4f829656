"""Packing and padding: every token once, no row sees another, nothing is learned that was not to be."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lab.data.batches import LENGTHS, Collator, training_rows
from llama_lab.data.templates import IGNORED
from llama_lab.dataset_config import DatasetSettings
from llama_lab.loss import summed_loss

PAD = 0


def rows_of(*lengths: int) -> list[dict[str, list[int]]]:
    """Rows of distinct tokens; the first half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :]})
    return rows


def packed(rows: list[dict[str, list[int]]], length: int) -> Dataset:
    settings = DatasetSettings(name="sample", max_length=length, packing=True)
    return training_rows(Dataset.from_list(rows), settings)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).double().eval()


def test_packing_keeps_every_row_whole_and_once():
    rows = rows_of(5, 9, 16, 3, 7, 12, 4)
    found = []
    for block in packed(rows, 16):
        assert len(block["input_ids"]) <= 16
        start = 0
        for length in block[LENGTHS]:
            found.append((block["input_ids"][start : start + length], block["labels"][start : start + length]))
            start += length
        assert start == len(block["input_ids"])
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert len(packed(rows, 16)) == 4  # 56 tokens do not fit in fewer blocks of 16


def test_a_packed_row_has_the_logits_of_the_lone_row(model):
    rows = rows_of(5, 9, 7)
    block = Collator(pad_token_id=PAD, multiple_of=8)(list(packed(rows, 24)))
    assert block["input_ids"].shape == (1, 24)
    logits = model(input_ids=block["input_ids"], position_ids=block["position_ids"], use_cache=False).logits[0]
    start = 0
    for length in packed(rows, 24)[0][LENGTHS]:
        ids = block["input_ids"][:, start : start + length]
        torch.testing.assert_close(logits[start : start + length], model(input_ids=ids).logits[0])
        start += length


def test_a_packed_row_would_differ_if_it_saw_its_neighbour(model):
    block = Collator(pad_token_id=PAD)(list(packed(rows_of(5, 9), 16)))
    alone = model(input_ids=block["input_ids"][:, 9:]).logits[0]
    joined = model(input_ids=block["input_ids"]).logits[0, 9:]
    assert not torch.allclose(alone, joined)


@pytest.mark.parametrize("multiple_of", [None, 8, 64])
def test_loss_is_the_same_packed_padded_and_alone(model, multiple_of):
    rows = rows_of(5, 9, 16, 3, 7)
    collate = Collator(pad_token_id=PAD, multiple_of=multiple_of)
    alone = [summed_loss(model, **collate([row])) for row in rows]
    together = summed_loss(model, **collate(rows))
    in_blocks = summed_loss(model, **collate(list(packed(rows, 16))))
    wanted = sum(loss for loss, _ in alone), sum(learned for _, learned in alone)
    for loss, learned in (together, in_blocks):
        torch.testing.assert_close(loss, wanted[0])
        assert learned == wanted[1]


def test_flattened_rows_are_those_of_the_model_itself(model):
    rows = rows_of(4, 20)
    batch = Collator(pad_token_id=PAD)(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(summed_loss(model, **batch)[0], wanted.float())


@pytest.mark.parametrize("blocks", [False, True])
def test_padding_and_what_follows_another_row_is_never_learned(blocks):
    rows = [row | {"labels": row["input_ids"]} for row in rows_of(5, 9, 16, 3)]
    batch = Collator(pad_token_id=PAD, multiple_of=32)(list(packed(rows, 16)) if blocks else rows)
    assert (batch["labels"][batch["input_ids"] == PAD] == IGNORED).all()
    if blocks:
        assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()
    assert batch["input_ids"].shape[1] == 32
