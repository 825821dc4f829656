"""The least time of a step, beside numbers worked out by hand."""

import pytest

from benchmarks.floor import CARDS, H100, SEVEN, base_flop, floor_ms, lora_flop, row_floor_ms
from llama_lab.choices import Memory
from llama_lab.compose import compose_words
from llama_lab.params import adapter_tensors

WORDS = ["model=llama2_7b", "lora=all_linear", "lora.r=16"]


def floor(memory, *words, num_tokens=1024, card=H100):
    return floor_ms(SEVEN, compose_words([*WORDS, *words]), Memory(memory), card, num_tokens=num_tokens)


def test_operations_are_those_of_the_linear_layers():
    # a block: four of 4,096 x 4,096 and three of 4,096 x 11,008; lm_head: 4,096 x 32,000
    block, head = 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 32000
    assert base_flop(SEVEN, Memory.fast) == 4 * (32 * block + head) == 26_428_309_504
    assert base_flop(SEVEN, Memory.lean) == 6 * 32 * block + 4 * head == 39_380_320_256


def test_operations_of_lora_are_three_times_those_of_its_weights():
    lora = compose_words(WORDS).lora
    assert sum(adapter_tensors(SEVEN, lora)) == 39_976_960
    assert lora_flop(SEVEN, lora, Memory.fast) == 6 * 39_976_960
    assert lora_flop(SEVEN, lora, Memory.lean) == 8 * 39_976_960
    wider = compose_words([*WORDS, "lora.r=256"]).lora
    assert lora_flop(SEVEN, wider, Memory.fast) == 16 * 6 * 39_976_960
    two = compose_words(["model=llama2_7b", "lora=attention", "lora.r=8"]).lora
    assert lora_flop(SEVEN, two, Memory.fast) == 6 * 32 * 2 * 8 * (4096 + 4096)


@pytest.mark.parametrize(
    ("memory", "quant", "ms"),
    [
        ("fast", "nf4", 34.2),  # 26.67 GFLOP a token
        ("balanced", "nf4", 34.2 + 2 * 5.4),
        ("balanced", "fp4", 34.2 + 2 * 5.4),
        ("balanced", "none", 34.2),
        ("lean", "nf4", 50.9 + 3 * 5.4),  # 39.70 GFLOP a token
        ("lean", "none", 50.9),
    ],
)
def test_a_step_of_1024_tokens_on_an_h100(memory, quant, ms):
    assert floor(memory, f"quant={quant}") == pytest.approx(ms, abs=0.1)


def test_tokens_multiply_and_dequantising_does_not_grow():
    passes = 2 * 5.4
    assert floor("balanced", num_tokens=2048) - passes == pytest.approx(2 * (floor("balanced") - passes))
    h200 = CARDS["NVIDIA H200"]
    assert floor("fast", card=h200) == floor("fast")
    assert floor("fast") < floor("balanced", card=h200) < floor("balanced")


def test_a_row_needs_the_level_that_auto_took_and_a_card_that_is_known():
    row = {"case": "tokens 1024", "card": "NVIDIA H100 80GB HBM3", "tokens_per_step": 1024, "settings": WORDS[1:]}
    assert row_floor_ms(row | {"memory": "fast"}) == pytest.approx(34.2, abs=0.1)
    assert row_floor_ms(row | {"settings": [*WORDS[1:], "trainer.memory=lean"]}) == pytest.approx(67.1, abs=0.1)
    assert row_floor_ms(row | {"card": "another"}) is None
    with pytest.raises(ValueError, match=r"tokens 1024.*memory"):
        row_floor_ms(row)
