"""An adapter on its base, with the tokenizer and template that it was trained with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_lab.config import RunConfig
from llama_lab.errors import ModelError
from llama_lab.process import prepare, quiet_libraries
from llama_lab.take.fits import check_loaded
from llama_lab.take.source import Source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_verb(config: RunConfig) -> None:
    """Set the libraries' switches and keep what they log off the screen. Call it before torch is imported."""
    prepare(config)
    logging.getLogger().addHandler(logging.NullHandler())  # else Python's handler of last resort prints it
    quiet_libraries(config)


def load_tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, else that of the base.

    Raises:
        ModelError: its files are damaged, or it has more tokens than the base has rows for.
    """
    from llama_lab.model import base_shape, load_tokenizer

    if (source.adapter / "tokenizer_config.json").is_file():
        tokenizer: Any = tokenizer_in(source.adapter)
        if not tokenizer.chat_template or (source.run_dir is None and source.config.model.chat_template):
            tokenizer.chat_template = load_tokenizer(source.config.model).chat_template
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # generation only pads on the left
    else:
        tokenizer = load_tokenizer(source.config.model)
    rows = base_shape(source.config.model).vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer of {source.adapter} has {len(tokenizer)} tokens, and {source.config.model.name} has rows "
            f"for {rows}: tokens were added before training. Type model.name= with the base that was resized to "
            f"{len(tokenizer)} rows."
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved in a folder.

    Raises:
        ModelError: its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # of each file another one
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ModelError(
            f"{folder}: its tokenizer cannot be read: {reason}. Bring tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja back as they were."
        ) from error


def load_on(base: PreTrainedModel, source: Source) -> PeftModel:
    """The adapter on a base that is loaded already, for answers only.

    Raises:
        ModelError: the adapter does not fit the base, or is not whole.
    """
    from peft import PeftModel

    from llama_lab.engine.choose import choose
    from llama_lab.engine.install import speed_up

    try:
        model = PeftModel.from_pretrained(base, str(source.adapter))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{source.adapter} does not load on {source.config.model.name}: {reason}") from error
    check_loaded(model, source.adapter)
    if choose(source.config).speeds_up_model:
        speed_up(model)
    return model.eval()


def load_trained(
    source: Source, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Base, adapter and tokenizer of a source. Call `prepare_verb` before.

    Args:
        tokenizer: where it has been loaded already.
    Raises:
        ModelError: something cannot be loaded, or does not fit.
    """
    from llama_lab.model import load_base, set_special_tokens

    tokenizer = load_tokenizer_of(source) if tokenizer is None else tokenizer
    base = load_base(source.config.model, source.config.quant)
    set_special_tokens(base, tokenizer)
    return load_on(base, source), tokenizer
