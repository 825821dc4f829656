"""trainer.micro_batch_size: the same optimizer steps, as many rows at once as fit."""

import psutil
import pytest

from llama_lab.activations import Device
from llama_lab.cards import USABLE_SHARE
from llama_lab.compose import compose_words
from llama_lab.errors import ConfigError
from llama_lab.memory import estimate
from llama_lab.micro_batch import Rows, resolve
from llama_lab.params import SHAPES

ROWS = Rows(longest=1024, padded=True)


def settings(*words: str):
    return compose_words(["model=tiny", *words])


def test_null_leaves_the_batch_as_it_is():
    config = settings("trainer.per_device_train_batch_size=6", "trainer.gradient_accumulation_steps=2")
    assert resolve(config, SHAPES["tiny"], ROWS) == (config.trainer, None)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_a_number_keeps_the_rows_of_a_step(size):
    config = settings(
        "trainer.per_device_train_batch_size=6",
        "trainer.gradient_accumulation_steps=2",
        f"trainer.micro_batch_size={size}",
    )
    trainer, _ = resolve(config, SHAPES["tiny"], ROWS)
    assert trainer.per_device_train_batch_size == size
    assert trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps == 12
    assert trainer.micro_batch_size is None


def test_auto_takes_the_most_that_fit_and_says_so():
    """On the CPU, of a model so large that not all rows fit."""
    config = settings("quant=none", "trainer.per_device_train_batch_size=4096", "trainer.micro_batch_size=auto")
    trainer, note = resolve(config, SHAPES["smollm2_135m"], ROWS)
    free = USABLE_SHARE * psutil.virtual_memory().available / 2**30

    def needed(size: int) -> float:
        import dataclasses

        tried = dataclasses.replace(config, trainer=config.trainer.with_micro_batch(size))
        return estimate(SHAPES["smollm2_135m"], tried, length=1024, device=Device.cpu, padded=True).total

    size = trainer.per_device_train_batch_size
    assert size < 4096
    assert needed(size) <= free * 1.05
    assert needed(2 * size) > free * 0.95
    assert size * trainer.gradient_accumulation_steps == 4096
    assert f"{size} rows" in note
    assert "4096 rows" in note


def test_auto_refuses_what_never_fits():
    config = settings("quant=none", "trainer.micro_batch_size=auto")
    with pytest.raises(ConfigError, match=r"not even one row of 1,024 tokens fits.*dataset\.max_length"):
        resolve(config, SHAPES["llama2_70b"], ROWS)
