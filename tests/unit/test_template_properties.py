"""What holds of any conversation, whatever people typed: every shipped template, with tokenizers of three kinds."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lab.choices import LossOn
from llama_lab.data.batches import Collator
from llama_lab.data.templates import IGNORED, TEMPLATE_NAMES, adds_bos, encode, encode_prompt, expected_bos

from .chats import (
    SENTENCEPIECE_LOST,
    SMOLLM2_LOST,
    SPECIAL,
    Case,
    any_chats,
    case_of,
    chatml_of,
    load,
    plain_chats,
    sentencepiece_file,
    sentencepiece_folder,
    smollm2,
)

KINDS = {
    "bytes": ("llama2", "codellama", "chatml", "alpaca", "guanaco"),
    "sentencepiece": ("llama2", "codellama", "alpaca", "guanaco"),
    "smollm2": ("chatml", "alpaca", "guanaco"),
}
"""The tokenizers, and the templates that each is tried with."""

several = settings(max_examples=20)


@pytest.fixture(scope="module")
def cases(tiny_tokenizer, tmp_path_factory) -> dict[tuple[str, str], Case]:
    llama = load(sentencepiece_folder(tmp_path_factory.mktemp("llama")), "llama2")
    code = load(sentencepiece_folder(tmp_path_factory.mktemp("code"), "CodeLlamaTokenizer"), "codellama")
    chatml, own = chatml_of(tiny_tokenizer), smollm2()

    def make(kind: str, template: str) -> Case:
        if kind == "smollm2":
            return case_of(template, own, SMOLLM2_LOST)
        if kind == "bytes":
            return case_of(template, chatml if template == "chatml" else tiny_tokenizer)
        return case_of(template, code if template == "codellama" else llama, SENTENCEPIECE_LOST)

    return {(kind, template): make(kind, template) for kind, templates in KINDS.items() for template in templates}


@pytest.fixture(
    scope="module",
    params=[(kind, template) for kind, templates in KINDS.items() for template in templates],
    ids="-".join,
)
def case(request, cases) -> Case:
    return cases[request.param]


def test_every_template_is_tried():
    assert {template for templates in KINDS.values() for template in templates} == set(TEMPLATE_NAMES)


@several
@given(chat=any_chats)
def test_prompt_alone_is_how_the_conversation_begins(case, chat):
    prompt = encode_prompt(chat[:-1], case.tokenizer)
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.completion)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)


@several
@given(chat=any_chats)
def test_tokens_give_the_conversation_back(case, chat):
    chat = case.spellable(chat)
    assert case.decode(encode({"messages": chat}, case.tokenizer, LossOn.completion)["input_ids"]) == case.render(chat)


@several
@given(chat=any_chats)
def test_last_answer_and_its_eos_are_learned_and_nothing_else(case, chat):
    chat = case.spellable(chat)
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.completion)
    assert case.learned_texts(encoded) == case.answers(chat)[-1:]


@several
@given(chat=any_chats)
def test_every_answer_and_its_eos_are_learned_with_loss_on_assistant(case, chat):
    chat = case.spellable(chat)
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.assistant)
    assert case.learned_texts(encoded) == case.answers(chat)
    ends = [here for here, behind in pairwise([*encoded["labels"], IGNORED]) if behind == IGNORED != here]
    assert ends == [case.tokenizer.eos_token_id] * len(case.answers(chat))


@several
@given(chat=any_chats)
def test_all_but_bos_and_pad_are_learned_with_loss_on_all(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.all)
    never = {case.tokenizer.bos_token_id, case.tokenizer.pad_token_id}
    assert encoded["labels"] == [IGNORED if token in never else token for token in encoded["input_ids"]]


@several
@given(chat=any_chats)
def test_special_tokens_are_those_that_the_template_writes_and_none_that_somebody_typed(case, chat):
    special = {i: token.content for i, token in case.tokenizer.added_tokens_decoder.items() if token.special}
    for token in sorted(special.values(), key=len, reverse=True):
        harmless = [{"role": m["role"], "content": m["content"].replace(token, "x")} for m in chat]
        chat_ids, harmless_ids = (
            encode({"messages": messages}, case.tokenizer, LossOn.completion)["input_ids"]
            for messages in (chat, harmless)
        )
        the_id = case.tokenizer.convert_tokens_to_ids(token)
        if token != case.tokenizer.unk_token:
            assert chat_ids.count(the_id) == harmless_ids.count(the_id), token
    assert chat_ids.count(case.tokenizer.bos_token_id) == expected_bos({"messages": chat}, case.tokenizer)


@several
@given(chat=plain_chats)
def test_tokens_and_answers_are_those_that_other_tools_get_from_the_same_template(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.assistant)
    assert encoded["input_ids"] == case.tokenizer.apply_chat_template(chat)["input_ids"]
    rendered = case.render(chat)
    assert all(answer in rendered for answer in case.answers(chat))


@several
@given(batch=st.lists(any_chats, min_size=1, max_size=3), loss_on=st.sampled_from(list(LossOn)))
def test_label_is_the_token_itself_and_never_padding(case, batch, loss_on):
    rows = [encode({"messages": chat}, case.tokenizer, loss_on) for chat in batch]
    collated = Collator(pad_token_id=case.tokenizer.pad_token_id)(rows)
    learned = collated["labels"] != IGNORED
    assert (collated["labels"] == collated["input_ids"])[learned].all()
    assert collated["attention_mask"][learned].all()
    assert not (collated["labels"] == case.tokenizer.pad_token_id).any()
    assert learned.any(dim=1).all()


@pytest.mark.parametrize("name", ["llama2", "codellama"])
@several
@given(chat=any_chats)
def test_tokens_are_those_of_metas_code_by_sentencepiece_itself(cases, name, chat):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file()))
    # each turn is a text of its own: BOS, "[INST] question [/INST] answer ", EOS; the system prompt opens the first
    texts = [m["content"].strip() for m in chat]
    if chat[0]["role"] == "system":
        texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
    turns = zip(texts[::2], texts[1::2], strict=True)
    wanted = [[1, *pieces.encode(f"[INST] {question} [/INST] {answer} "), 2] for question, answer in turns]
    encoded = encode({"messages": chat}, cases["sentencepiece", name].tokenizer, LossOn.completion)
    assert encoded["input_ids"] == list(chain.from_iterable(wanted))


# Text


@several
@given(text=st.text(min_size=1).filter(lambda text: not any(special in text for special in SPECIAL)))
def test_text_is_learned_whole_with_its_eos_and_without_a_bos_that_is_added(case, text):
    text = case.spellable([{"role": "user", "content": text}])[0]["content"]
    encoded = encode({"text": text}, case.tokenizer, LossOn.all)
    ids, labels = encoded["input_ids"], encoded["labels"]
    has_bos = case.tokenizer.bos_token == "<s>"
    assert labels == [IGNORED, *ids[1:]] if has_bos else labels == ids
    assert ids[-1] == case.tokenizer.eos_token_id
    own = case.tokenizer(text)["input_ids"]
    assert ids == [*own, case.tokenizer.eos_token_id]
    assert ids.count(case.tokenizer.bos_token_id) == expected_bos({"text": text}, case.tokenizer) == has_bos


@several
@given(chat=plain_chats)
def test_conversation_written_out_as_text_has_the_tokens_of_the_chat(case, chat):
    chat = case.spellable(chat)
    ids = encode({"messages": chat}, case.tokenizer, LossOn.all)["input_ids"]
    written = case.render(chat)
    if case.template == "chatml":
        ids, written = ids[:-1], written.removesuffix("\n")  # a text ends with its EOS
    if adds_bos(case.tokenizer) and ids[0] != case.tokenizer.bos_token_id:
        ids = [case.tokenizer.bos_token_id, *ids]  # ChatML begins with none
    encoded = encode({"text": written}, case.tokenizer, LossOn.all)
    assert encoded["input_ids"] == ids
    assert ids.count(case.tokenizer.bos_token_id) == expected_bos({"text": written}, case.tokenizer)
