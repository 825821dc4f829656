"""Ghost Attention: the instruction is in every question that is sampled from, and in the first one that is learned."""

import pytest
from hypothesis import given, settings

from llama_lab.choices import LossOn
from llama_lab.data.ghost import augment, ghost_attention, ghost_loss_on
from llama_lab.data.templates import TEMPLATE_NAMES, encode

from .chats import ONE_TURN, SYSTEM, TWO_TURNS, any_chats, case_of, chatml_of

DIALOGUE = [SYSTEM, *TWO_TURNS]


def contents(messages: list[dict[str, str]], role: str) -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def test_instruction_stands_in_every_question_that_is_sampled_from():
    assert augment(DIALOGUE) == [
        {"role": "user", "content": "S\n\nU1"},
        TWO_TURNS[1],
        {"role": "user", "content": "S\n\nU2"},
        TWO_TURNS[3],
    ]


def test_prompt_of_each_answer_can_be_augmented_by_itself():
    for end in (2, 4):
        assert augment(DIALOGUE[:end]) == augment(DIALOGUE)[: end - 1]


def test_instruction_is_learned_with_the_first_question_only():
    stored = [SYSTEM, *augment(DIALOGUE)]
    assert ghost_attention(stored) == DIALOGUE
    assert ghost_attention(DIALOGUE) == DIALOGUE


@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS, [{"role": "system", "content": " \n"}, *ONE_TURN], []])
@pytest.mark.parametrize("loss_on", list(LossOn))
def test_dialogue_without_an_instruction_stays_as_it_is(messages, loss_on):
    assert augment(messages) == ghost_attention(messages) == messages
    assert ghost_loss_on(messages, loss_on) is loss_on


@pytest.mark.parametrize("loss_on", list(LossOn))
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_no_token_of_an_earlier_turn_is_learned(tiny_tokenizer, name, loss_on):
    case = case_of(name, chatml_of(tiny_tokenizer) if name == "chatml" else tiny_tokenizer)
    learned = ghost_attention([SYSTEM, *augment(DIALOGUE)])
    encoded = encode({"messages": learned}, case.tokenizer, ghost_loss_on(learned, loss_on))
    assert case.learned_texts(encoded) == case.answers(DIALOGUE)[-1:]
    assert case.decode(encoded["input_ids"]) == case.render(DIALOGUE)


@settings(max_examples=30)
@given(chat=any_chats)
def test_learned_dialogue_is_the_one_that_was_augmented(chat):
    before = [dict(message) for message in chat]
    augmented = augment(chat)
    assert chat == before
    assert contents(augmented, "assistant") == contents(chat, "assistant")
    if augmented == chat:
        return
    assert contents(augmented, "system") == []
    assert ghost_attention([chat[0], *augmented]) == chat
