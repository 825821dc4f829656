"""What the unit tests share: the tiny model and its tokenizer, made once a session in a cache folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from llama_lab.choices import ComputeDtype, QuantType
from llama_lab.compose import compose_words
from llama_lab.config import QuantSettings

# the same examples every time: a test that fails once fails until it is mended
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LLAMA_LAB_CACHE of this session, so that no test reads or fills the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("llama_lab_cache")
        patch.setenv("LLAMA_LAB_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def tiny_tokenizer(model_cache):
    """The tokenizer of model=tiny: bytes, with Llama-2's special tokens and template. Copy it before you change it."""
    from llama_lab.model import load_tokenizer

    return load_tokenizer(compose_words(["model=tiny"]).model)


@pytest.fixture(scope="session")
def tiny_base(model_cache) -> Callable:
    """Loads model=tiny, stored as `quant` and computing in fp32 on every machine, or as told; a new one each call."""
    from llama_lab.model import load_base

    model = compose_words(["model=tiny"]).model

    def load(quant: str = "none", compute: str = "float32"):
        return load_base(model, QuantSettings(type=QuantType(quant), compute_dtype=ComputeDtype(compute)))

    return load
