"""Chat to tokens: the shipped templates give the published formats, and what is learned is the answer and its EOS."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llama_lab.choices import LossOn
from llama_lab.data.templates import IGNORED, TEMPLATE_NAMES, encode, encode_prompt, read_template
from llama_lab.errors import DataError

SYSTEM = {"role": "system", "content": "S"}
ONE_TURN = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"}]

# Meta's reference, llama/generation.py: each turn is BOS + f"[INST] {prompt} [/INST] {answer} " + EOS, and the system
# prompt stands in the first prompt between "<<SYS>>\n" and "\n<</SYS>>\n\n".
LLAMA2 = [
    (ONE_TURN, "<s>[INST] U1 [/INST] A1 </s>"),
    (TWO_TURNS, "<s>[INST] U1 [/INST] A1 </s><s>[INST] U2 [/INST] A2 </s>"),
    ([SYSTEM, *ONE_TURN], "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s>"),
    (
        [SYSTEM, *TWO_TURNS],
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST] A2 </s>",
    ),
]
# OpenAI's ChatML: <|im_start|>role, a line break, the content, <|im_end|>, a line break.
CHATML = [
    (ONE_TURN, "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"),
    (
        [SYSTEM, *TWO_TURNS],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    ),
]
PUBLISHED = [("llama2", *case) for case in LLAMA2] + [("chatml", *case) for case in CHATML]

MARKERS = [
    *("[INST]", "[/INST]", " [/INST] ", "<<SYS>>\n", "\n<</SYS>>\n\n", "### Human:", "user\n", "assistant\n"),
    *("{{ x }}", "{% generation %}", "{% endgeneration %}", "{# x #}", " ", "\n", "\t", "\u3000", "é", "🙂", "אב"),
]
"""What templates are made of, and white space of several kinds; none of it is a special token."""

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


@dataclass
class Case:
    """A template with a tokenizer that it fits, and how it writes an answer."""

    tokenizer: Any
    before: str
    """Stands before the answer, and is learned with it."""
    after: str
    """Stands behind the answer; the EOS is its end."""


@pytest.fixture(scope="module")
def cases(tiny_tokenizer) -> dict[str, Case]:
    chatml = copy.deepcopy(tiny_tokenizer)
    chatml.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    chatml.chat_template = read_template("chatml")
    return {
        "llama2": Case(tokenizer=tiny_tokenizer, before=" ", after=" </s>"),
        "chatml": Case(tokenizer=chatml, before="", after="<|im_end|>"),
    }


@pytest.fixture(scope="module", params=TEMPLATE_NAMES)
def case(request, cases) -> Case:
    return cases[request.param]


def chats(words: list[str], max_turns: int = 4) -> st.SearchStrategy[list[dict[str, str]]]:
    """Conversations of 1 to `max_turns` turns, with or without a system prompt, of random text and `words`."""
    piece = st.one_of(st.text(max_size=8), st.sampled_from(words))
    text = st.lists(piece, max_size=4).map("".join)

    def build(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        first = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        return first + [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]

    return st.builds(build, st.none() | text, st.lists(st.tuples(text, text), min_size=1, max_size=max_turns))


plain_chats = chats(MARKERS).filter(lambda chat: not any(s in m["content"] for m in chat for s in SPECIAL))
"""Conversations in which no special token is written out."""

any_chats = chats(MARKERS + SPECIAL)


def render(messages: list[dict[str, str]], tokenizer: Any, **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))


def learned(encoded: dict[str, list[int]]) -> list[tuple[int, int]]:
    """(position, token) of all that is learned."""
    return [(i, label) for i, label in enumerate(encoded["labels"]) if label != IGNORED]


def answers_of(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"].strip() for message in messages if message["role"] == "assistant"]


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


# The published formats


@pytest.mark.parametrize(("name", "messages", "text"), PUBLISHED)
def test_template_renders_the_published_format(cases, name, messages, text):
    assert render(messages, cases[name].tokenizer) == text


@pytest.mark.parametrize(("name", "messages", "text"), PUBLISHED)
def test_tokens_are_those_of_the_published_format(cases, name, messages, text):
    tokenizer = cases[name].tokenizer
    ids = encode({"messages": messages}, tokenizer, LossOn.completion)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_prompt_ends_where_the_answer_begins(cases):
    for name, text in (
        ("llama2", "<s>[INST] U1 [/INST]"),
        ("chatml", "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n"),
    ):
        tokenizer = cases[name].tokenizer
        assert tokenizer.decode(encode_prompt(ONE_TURN[:1], tokenizer)) == text


def test_llama2_takes_away_the_space_around_every_text(cases):
    padded = [{"role": m["role"], "content": f" \n{m['content']}\t "} for m in [SYSTEM, *TWO_TURNS]]
    assert render(padded, cases["llama2"].tokenizer) == LLAMA2[-1][1]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([*ONE_TURN, SYSTEM, *ONE_TURN], "a system message can only come first"),
        ([{"role": "tool", "content": "x"}, *ONE_TURN], "knows the roles system, user and assistant"),
    ],
)
def test_llama2_refuses_what_its_format_cannot_say(cases, messages, said):
    with pytest.raises(DataError, match=said):
        encode({"messages": messages}, cases["llama2"].tokenizer, LossOn.completion)


# What is learned: properties of every conversation


@given(chat=any_chats)
def test_prompt_alone_is_how_the_conversation_begins(case, chat):
    prompt = encode_prompt(chat[:-1], case.tokenizer)
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.completion)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [IGNORED] * len(prompt)


@given(chat=plain_chats)
def test_last_answer_and_its_eos_are_learned_and_nothing_else(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.completion)
    positions, tokens = zip(*learned(encoded), strict=True)
    assert case.tokenizer.decode(tokens) == f"{case.before}{answers_of(chat)[-1]}{case.after}"
    assert tokens[-1] == case.tokenizer.eos_token_id
    assert positions == tuple(range(len(encode_prompt(chat[:-1], case.tokenizer)), positions[-1] + 1))


@given(chat=plain_chats)
def test_every_answer_and_its_eos_are_learned_with_loss_on_assistant(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.assistant)
    text = case.tokenizer.decode([token for _, token in learned(encoded)])
    assert text == "".join(f"{case.before}{answer}{case.after}" for answer in answers_of(chat))


@given(chat=any_chats)
def test_all_but_bos_and_pad_are_learned_with_loss_on_all(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.all)
    never = {case.tokenizer.bos_token_id, case.tokenizer.pad_token_id}
    assert encoded["labels"] == [IGNORED if token in never else token for token in encoded["input_ids"]]


@given(chat=any_chats, loss_on=st.sampled_from([LossOn.completion, LossOn.assistant, LossOn.all]))
def test_label_is_the_token_itself_and_never_bos_or_pad(case, chat, loss_on):
    encoded = encode({"messages": chat}, case.tokenizer, loss_on)
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    assert all(encoded["input_ids"][i] == label for i, label in learned(encoded))
    assert not {case.tokenizer.bos_token_id, case.tokenizer.pad_token_id} & set(encoded["labels"])
    assert learned(encoded)[-1][1] == case.tokenizer.eos_token_id or loss_on is LossOn.all


@given(chat=plain_chats)
def test_llama2_has_one_bos_and_one_eos_a_turn(cases, chat):
    tokenizer = cases["llama2"].tokenizer
    ids = encode({"messages": chat}, tokenizer, LossOn.completion)["input_ids"]
    num_turns = len(answers_of(chat))
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == num_turns
    assert ids[0] == tokenizer.bos_token_id


@given(chat=plain_chats)
def test_markers_of_the_shipped_templates_tell_other_tools_the_same_answers(case, chat):
    encoded = encode({"messages": chat}, case.tokenizer, LossOn.assistant)
    marked = case.tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert marked["input_ids"] == encoded["input_ids"]
    assert [i for i, mark in enumerate(marked["assistant_masks"]) if mark] == [i for i, _ in learned(encoded)]


@given(chat=any_chats, loss_on=st.sampled_from(list(LossOn)))
def test_template_without_markers_gives_the_same_labels(case, chat, loss_on):
    bare = with_template(case.tokenizer, re.sub(r"{% (end)?generation %}", "", case.tokenizer.chat_template))
    assert encode({"messages": chat}, bare, loss_on) == encode({"messages": chat}, case.tokenizer, loss_on)


def test_answer_that_begins_with_what_the_tokenizer_drops_is_still_learned(tiny_tokenizer):
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\x16", "")  # as SmolLM2's, which lacks this byte
    tokenizer.chat_template = read_template("llama2").replace("{{ ' ' +", "{{ ")  # nothing stands before the answer
    encoded = encode(
        {"messages": [ONE_TURN[0], {"role": "assistant", "content": "\x16A1"}]}, tokenizer, LossOn.completion
    )
    assert tokenizer.decode([token for _, token in learned(encoded)]) == "A1 </s>"


def test_bos_that_is_the_eos_too_is_learned_at_the_end_of_an_answer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token  # as in SmolLM2's base model
    encoded = encode({"messages": ONE_TURN}, tokenizer, LossOn.all)
    assert tokenizer.decode(encoded["input_ids"]) == "</s>[INST] U1 [/INST] A1 </s>"
    assert [encoded["labels"][0], encoded["labels"][-1]] == [IGNORED, tokenizer.eos_token_id]


def test_special_tokens_written_out_in_a_chat_are_parsed_and_the_answer_goes_on_to_its_own_eos(tiny_tokenizer):
    chat = [{"role": "user", "content": "<s>U"}, {"role": "assistant", "content": "a<s>b</s>c"}]
    encoded = encode({"messages": chat}, tiny_tokenizer, LossOn.completion)
    assert encoded["input_ids"].count(tiny_tokenizer.bos_token_id) == 3
    assert tiny_tokenizer.decode([token for _, token in learned(encoded)]) == " ab</s>c </s>"


# Templates of other people


NO_MARKERS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"

TRAINABLE = [
    # no markers; the prompt for generation begins the answer's turn
    NO_MARKERS + "{% if add_generation_prompt %}assistant:{% endif %}",
    # markers with white space control, and a line break that is marked behind the EOS
    "{%- for m in messages %}{{ m['role'] + ':' }}{%- if m['role'] == 'assistant' %}{%- generation -%}"
    "{{ m['content'] + eos_token + '\n' }}{%- endgeneration -%}{%- else %}{{ m['content'] + eos_token + '\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}assistant:{%- endif %}",
]
UNTRAINABLE = [
    # the prompt for generation says what training does not
    (
        NO_MARKERS + "{% if add_generation_prompt %}assistant (thinks):{% endif %}",
        "a prompt alone and in a conversation",
    ),
    # earlier turns look different once there are later ones
    (
        "{{ messages | length }}" + NO_MARKERS + "{% if add_generation_prompt %}assistant:{% endif %}",
        "a prompt alone and in a conversation",
    ),
    (
        "{% for m in messages %}{{ m['role'] + ':' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}robot:{% endif %}",
        "a prompt alone and in a conversation",
    ),
    # an answer that never ends
    (
        NO_MARKERS.replace(" + eos_token", "") + "{% if add_generation_prompt %}assistant:{% endif %}",
        "without the tokeni",
    ),
    (
        "{% for m in messages %}{{ m['role'] + ':' }}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "without the tokenizer's EOS </s>",
    ),
    # ChatML on a model whose EOS is another
    (read_template("chatml"), "without the tokenizer's EOS </s>"),
    ("{{ raise_exception('no chats today') }}", "refuses this conversation: no chats today"),
]


@pytest.mark.parametrize("template", TRAINABLE)
@given(chat=plain_chats)
def test_template_of_another_model_teaches_the_answer_and_its_eos(tiny_tokenizer, template, chat):
    tokenizer = with_template(tiny_tokenizer, template)
    encoded = encode({"messages": chat}, tokenizer, LossOn.completion)
    assert tokenizer.decode([token for _, token in learned(encoded)]) == chat[-1]["content"] + "</s>"


@pytest.mark.parametrize("loss_on", [LossOn.completion, LossOn.assistant, LossOn.all])
@pytest.mark.parametrize(("template", "said"), UNTRAINABLE)
def test_template_that_would_teach_the_wrong_thing_is_refused(tiny_tokenizer, template, said, loss_on):
    with pytest.raises(DataError, match=said):
        encode({"messages": TWO_TURNS}, with_template(tiny_tokenizer, template), loss_on)


@pytest.mark.parametrize("template", [template for template, said in UNTRAINABLE if "alone" in said])
def test_refusal_of_a_template_names_those_that_work(tiny_tokenizer, template):
    with pytest.raises(DataError, match=re.escape("Type model.chat_template=chatml|llama2")):
        encode({"messages": TWO_TURNS}, with_template(tiny_tokenizer, template), LossOn.completion)


def test_template_that_shortens_earlier_answers_can_teach_the_last_one_only(tiny_tokenizer):
    short = "m['content'] if loop.last or m['role'] == 'user' else m['content'][:1]"  # as those that leave thoughts out
    template = NO_MARKERS.replace("m['content']", f"({short})") + "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = with_template(tiny_tokenizer, template)
    encoded = encode({"messages": TWO_TURNS}, tokenizer, LossOn.completion)
    assert tokenizer.decode(encoded["input_ids"]) == "user:U1</s>assistant:A</s>user:U2</s>assistant:A2</s>"
    assert tokenizer.decode([token for _, token in learned(encoded)]) == "A2</s>"
    with pytest.raises(DataError, match="a prompt alone and in a conversation differently"):
        encode({"messages": TWO_TURNS}, tokenizer, LossOn.assistant)


# Text


@pytest.mark.parametrize(
    "text", ["hello", "<s>hello", "hello</s>", "<s>hello</s>", "\n <s>hello</s> \n", "<s>hello</s>\n"], ids=repr
)
def test_text_gets_only_the_special_tokens_that_it_lacks(tiny_tokenizer, text):
    encoded = encode({"text": text}, tiny_tokenizer, LossOn.all)
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    hello = tiny_tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert encoded == {"input_ids": [bos, *hello, eos], "labels": [IGNORED, *hello, eos]}


@given(text=st.text(min_size=1))
def test_text_is_learned_whole_with_its_eos_and_without_bos(tiny_tokenizer, text):
    assume(not any(special in text for special in SPECIAL))
    encoded = encode({"text": text}, tiny_tokenizer, LossOn.all)
    assert tiny_tokenizer.decode([token for _, token in learned(encoded)]) == f"{text}</s>"
    assert encoded["labels"][0] == IGNORED


@pytest.mark.parametrize(("messages", "text"), LLAMA2)
def test_conversation_written_out_as_text_has_the_tokens_of_the_chat(tiny_tokenizer, messages, text):
    chat = encode({"messages": messages}, tiny_tokenizer, LossOn.all)
    assert encode({"text": text}, tiny_tokenizer, LossOn.all) == chat
