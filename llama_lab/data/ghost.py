"""Ghost Attention: an instruction that a model keeps to over many turns, though it was given once.

Source: Llama 2, arXiv 2307.09288, section 3.3. The data are made in two steps. First the instruction (our system
message) is put before every question of a dialogue, and the answers are sampled from a model that so never loses sight
of it. Then the instruction is taken out of all questions but the first, and the model learns to answer as if it were
still there. The earlier answers were sampled with the instruction at hand, which the training row no longer shows: they
are not learned, only the last answer is.

    answer k is sampled from    augment(messages up to question k)
    the row that is learned     ghost_attention(messages)
    the labels                  encode({"messages": ...}, tokenizer, ghost_loss_on(messages, loss_on))

A dialogue without a system message is none of this: it is returned as it is.
"""

from llama_lab.choices import LossOn
from llama_lab.data.templates import Messages

_BETWEEN = "\n\n"
"""Between instruction and question. The paper names no separator; Llama-2's template has an empty line there too."""


def augment(messages: Messages) -> Messages:
    """The dialogue that answers are sampled from: the instruction stands in every question, not in a system message."""
    instruction = _instruction(messages)
    if instruction is None:
        return messages
    return [_question(f"{instruction}{_BETWEEN}{m['content']}") if m["role"] == "user" else m for m in messages[1:]]


def ghost_attention(messages: Messages) -> Messages:
    """The dialogue that is learned: the instruction stands in the system message alone.

    Templates show a system message once, with or before the first question. Questions may have the instruction before
    them, as `augment` writes it, or not; the answers are kept.
    """
    instruction = _instruction(messages)
    if instruction is None:
        return messages
    start = f"{instruction}{_BETWEEN}"
    return [_without(start, message) for message in messages]


def ghost_loss_on(messages: Messages, loss_on: LossOn) -> LossOn:
    """What is learned of the dialogue: no token of an earlier turn, answers included, where there is an instruction."""
    return loss_on if _instruction(messages) is None else LossOn.completion


def _instruction(messages: Messages) -> str | None:
    first = messages[0] if messages else None
    return first["content"].strip() or None if first is not None and first["role"] == "system" else None


def _question(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _without(start: str, message: dict[str, str]) -> dict[str, str]:
    is_augmented = message["role"] == "user" and message["content"].startswith(start)
    return _question(message["content"].removeprefix(start)) if is_augmented else message
