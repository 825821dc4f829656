"""Conversations and tokenizers that the tests of templates share."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from llama_lab.choices import ModelSource
from llama_lab.config import ModelSettings
from llama_lab.data.templates import IGNORED, set_template

SYSTEM = {"role": "system", "content": "S"}
ONE_TURN = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"}]

MARKERS = [
    *("[INST]", "[/INST]", " [/INST] ", "<<SYS>>\n", "\n<</SYS>>\n\n", "### Human:", "user\n", "assistant\n"),
    *("### Response:\n", "{{ x }}", "{% generation %}", "{% endgeneration %}", "{# x #}"),
    *(" ", "\n", "\t", "\u3000", "é", "🙂", "אב", "\ufdd0", "\ufdd00\ufdd1"),
]
"""What templates are made of, white space of several kinds, and the marks of our own code; no special token."""

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "▁<PRE>"]

BEFORE_AND_AFTER = {
    "llama2": (" ", " "),
    "codellama": (" ", " "),
    "chatml": ("", ""),
    "alpaca": ("", ""),
    "guanaco": (" ", ""),
}
"""What a template puts around an answer, the EOS aside; it is learned with it."""


@dataclass(kw_only=True)
class Case:
    """A template with a tokenizer that it fits."""

    template: str
    tokenizer: Any = field(repr=False)
    lost: str = "(?!)"
    """A pattern of the characters that the tokenizer cannot give back."""

    def spellable(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": re.sub(self.lost, "", m["content"])} for m in messages]

    def answers(self, messages: list[dict[str, str]]) -> list[str]:
        """The answers as they are learned."""
        before, after = BEFORE_AND_AFTER[self.template]
        texts = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        return [f"{before}{text}{after}{self.tokenizer.eos_token}" for text in texts]

    def learned_texts(self, encoded: dict[str, list[int]]) -> list[str]:
        """The text of every run of learned tokens."""
        ids, wanted = encoded["input_ids"], [label != IGNORED for label in encoded["labels"]]
        starts = [i for i, on in enumerate(wanted) if on and not (i and wanted[i - 1])]
        ends = [i + 1 for i, on in enumerate(wanted) if on and (i + 1 == len(wanted) or not wanted[i + 1])]
        # some decoders drop a leading space, so that a run has its text only behind what comes before it
        return [
            self.decode(ids[:end]).removeprefix(self.decode(ids[:start]))
            for start, end in zip(starts, ends, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def render(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))


def case_of(template: str, tokenizer: Any, lost: str = "(?!)") -> Case:
    """The template on a copy of the tokenizer, which shares its vocabulary."""
    tokenizer = copy.copy(tokenizer)
    set_template(tokenizer, template)
    return Case(template=template, tokenizer=tokenizer, lost=lost)


def chats(words: list[str], max_turns: int = 3) -> st.SearchStrategy[list[dict[str, str]]]:
    """Conversations of 1 to `max_turns` turns, with or without a system prompt, of random text and `words`."""
    piece = st.one_of(st.text(max_size=8), st.sampled_from(words))
    text = st.lists(piece, max_size=4).map("".join)

    def build(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        first = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        return first + [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]

    return st.builds(build, st.none() | text, st.lists(st.tuples(text, text), min_size=1, max_size=max_turns))


any_chats = chats(MARKERS + SPECIAL)

plain_chats = chats(MARKERS).filter(lambda chat: not any(s in m["content"] for m in chat for s in SPECIAL))
"""Conversations in which no special token is written out."""


def chatml_of(tiny: Any) -> Any:
    """The tokenizer of bytes with ChatML's special tokens."""
    tokenizer = copy.deepcopy(tiny)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


SENTENCEPIECE_LOST = "▁"
"""Stands for a space."""

SMOLLM2_LOST = "[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]"
"""Its vocabulary lacks these bytes, so its tokenizer drops them."""


def sentencepiece_file() -> Path:
    """A tokenizer of 32,000 SentencePiece pieces made as Llama-2's was, but from other texts: Mistral 7B's."""
    spec = find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs: pip install --no-deps mistral-common")
    return Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


@cache
def sentencepiece_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the pieces, and which pairs are joined, the best first.

    transformers 5 orders the pairs by id, not by score, where it finds the SentencePiece file alone, and then joins
    spaces otherwise than SentencePiece does; on the hub Llama-2 has a tokenizer.json with the right order.
    """
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(sentencepiece_file()))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [(p[:cut], p[cut:]) for p in vocab for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    merges.sort(key=lambda pair: (-pieces.get_score(vocab["".join(pair)]), vocab[pair[0]], vocab[pair[1]]))
    return vocab, merges


def sentencepiece_folder(folder: Path, tokenizer_class: str = "LlamaTokenizer") -> Path:
    """A model folder as Llama-2's on the hub, as far as its tokenizer goes."""
    import transformers

    vocab, merges = sentencepiece_vocabulary()
    getattr(transformers, tokenizer_class)(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(folder)
    return folder


def load(folder: Path, template: str) -> Any:
    """The tokenizer of a folder as a run loads it."""
    from llama_lab.model import load_tokenizer

    tokenizer = load_tokenizer(ModelSettings(name=str(folder), chat_template=template))
    set_template(tokenizer, template)
    return tokenizer


def smollm2() -> Any:
    """SmolLM2's own tokenizer, from the package that brings the embedded model, without its weights."""
    from transformers import AutoTokenizer

    from llama_lab.compose import compose_words
    from llama_lab.embedded import gguf_file

    model = compose_words(["model=smollm2_135m"]).model
    assert model.source is ModelSource.package
    file = gguf_file(model)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    return tokenizer
