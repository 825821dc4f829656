"""Rows of every format become the chat that they mean, and a row that cannot says what to type instead."""

import pytest

from llama_lab.choices import DataFormat
from llama_lab.config import ColumnSettings, DatasetSettings
from llama_lab.data.formats import COLUMNS, detect_format, to_example
from llama_lab.errors import DataError

ROWS = {
    DataFormat.messages: {
        "messages": [
            {"role": "system", "content": "You name capitals."},
            {"role": "user", "content": "France?"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "Peru?"},
            {"role": "assistant", "content": "Lima."},
        ]
    },
    DataFormat.sharegpt: {
        "id": "7",
        "conversations": [
            {"from": "system", "value": "You name capitals."},
            {"from": "human", "value": "France?"},
            {"from": "gpt", "value": "Paris."},
        ],
    },
    DataFormat.prompt_completion: {"prompt": "France?", "completion": "Paris."},
    DataFormat.alpaca: {"instruction": "Name the capital.", "input": "Country: France", "output": "Paris."},
    DataFormat.quotes: {"quote": "“Know thyself.”", "author": "Socrates", "tags": ["self"]},
    DataFormat.guanaco: {"text": "### Human: France?### Assistant: Paris.### Human: Peru?### Assistant: Lima."},
    DataFormat.text: {"text": "<s>[INST] France? [/INST] Paris. </s>"},
}
"""One row of ours in every format."""


def chat(*turns: str) -> dict[str, list[dict[str, str]]]:
    """{"messages": ...} of turns written as "user: ..."."""
    split = [turn.split(": ", 1) for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in split]}


EXAMPLES = {
    DataFormat.messages: chat(
        "system: You name capitals.", "user: France?", "assistant: Paris.", "user: Peru?", "assistant: Lima."
    ),
    DataFormat.sharegpt: chat("system: You name capitals.", "user: France?", "assistant: Paris."),
    DataFormat.prompt_completion: chat("user: France?", "assistant: Paris."),
    DataFormat.alpaca: chat("user: Name the capital.\n\nCountry: France", "assistant: Paris."),
    DataFormat.quotes: chat("user: Give me a quote by Socrates.", "assistant: “Know thyself.”"),
    DataFormat.guanaco: chat("user: France?", "assistant: Paris.", "user: Peru?", "assistant: Lima."),
    DataFormat.text: {"text": "<s>[INST] France? [/INST] Paris. </s>"},
}
"""What the rows mean."""


def settings(**kwargs) -> DatasetSettings:
    kwargs["columns"] = ColumnSettings(**kwargs.get("columns", {}))
    return DatasetSettings(path="rows.jsonl", **kwargs)


def convert(row: dict, **kwargs) -> dict:
    """The example of a row, its format read from its columns."""
    dataset = settings(**kwargs)
    return to_example(row, detect_format(row, dataset), dataset)


def refusal(row: dict, **kwargs) -> str:
    """The message with which a row is refused."""
    with pytest.raises(DataError) as caught:
        convert(row, **kwargs)
    return str(caught.value)


def test_every_format_is_tried_here():
    assert set(ROWS) == set(EXAMPLES) == set(COLUMNS) == set(DataFormat) - {DataFormat.auto}


@pytest.mark.parametrize("form", ROWS, ids=str)
def test_format_is_read_from_the_columns(form):
    assert detect_format(ROWS[form], settings()) is form


@pytest.mark.parametrize("form", ROWS, ids=str)
def test_row_becomes_the_chat_that_it_means(form):
    assert to_example(ROWS[form], form, settings()) == EXAMPLES[form]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": " \n"}, {"input": None}], ids=str)
def test_alpaca_row_without_input_asks_the_instruction_alone(empty):
    row = {"instruction": "Say hello.", "output": "Hello."} | empty
    assert convert(row) == chat("user: Say hello.", "assistant: Hello.")


def test_guanaco_conversation_that_breaks_off_at_a_question_ends_with_the_last_answer():
    row = {"text": "### Human: France?\n### Assistant: Paris.\n### Human: And Peru?"}
    assert convert(row) == chat("user: France?", "assistant: Paris.")


def test_guanaco_answer_keeps_its_lines_and_loses_the_space_around_it():
    row = {"text": "### Human: Two lines?### Assistant:  one\n  two \n"}
    assert convert(row) == chat("user: Two lines?", "assistant: one\n  two")


def test_text_that_is_no_conversation_is_learned_as_it_is():
    row = {"text": "  Once upon a time ### Human: came.\n"}
    assert convert(row) == row


def test_sharegpt_takes_the_roles_of_chat_too():
    row = {"conversations": [{"from": "user", "value": "France?"}, {"from": "assistant", "value": "Paris."}]}
    assert convert(row) == chat("user: France?", "assistant: Paris.")


def test_answer_and_question_are_kept_to_the_letter():
    row = {"prompt": "  a\n\tb ", "completion": "\n<s> é 🙂 "}
    assert [message["content"] for message in convert(row)["messages"]] == list(row.values())


def test_format_that_is_asked_for_wins_over_the_columns():
    row = {"text": ROWS[DataFormat.guanaco]["text"], "prompt": "a", "completion": "b"}
    for form, wanted in (("text", DataFormat.text), ("guanaco", DataFormat.guanaco), ("auto", "prompt_completion")):
        assert detect_format(row, settings(format=DataFormat(form))) == wanted


@pytest.mark.parametrize(
    ("row", "columns", "form"),
    [
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"body": "a b c"}, {"text": "body"}, "text"),
        ({"chat": ROWS[DataFormat.messages]["messages"]}, {"messages": "chat"}, "messages"),
        ({"turns": ROWS[DataFormat.sharegpt]["conversations"]}, {"conversations": "turns"}, "sharegpt"),
        (
            {"task": "a", "context": "b", "solution": "c"},
            {"instruction": "task", "input": "context", "output": "solution"},
            "alpaca",
        ),
        ({"words": "a", "who": "b"}, {"quote": "words", "author": "who"}, "quotes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_of_another_name_are_mapped(row, columns, form):
    dataset = settings(columns=columns)
    assert detect_format(row, dataset) == form
    renamed = {next((ours for ours, theirs in columns.items() if theirs == name), name): row[name] for name in row}
    assert to_example(row, DataFormat(form), dataset) == to_example(renamed, DataFormat(form), settings())


def test_system_prompt_comes_before_a_chat_that_has_none():
    asked = chat("system: Be brief.", "user: France?", "assistant: Paris.")
    assert convert(ROWS[DataFormat.prompt_completion], system_prompt="Be brief.") == asked
    assert convert(ROWS[DataFormat.messages], system_prompt="Be brief.") == EXAMPLES[DataFormat.messages]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"question": "a", "answer": "b"}, "Type dataset.columns.prompt=question dataset.columns.completion=answer"),
        ({"Prompt": "a", "Response": "b"}, "Type dataset.columns.prompt=Prompt dataset.columns.completion=Response"),
        ({"foo": "a", "bar": "b"}, "Name them: dataset.columns.prompt=... dataset.columns.completion=..."),
    ],
)
def test_columns_that_fit_no_format_are_named_with_the_words_that_map_them(row, hint):
    message = refusal(row)
    assert f"the columns {', '.join(row)} fit no format" in message
    assert hint in message


@pytest.mark.parametrize(
    ("row", "form", "hint"),
    [
        ({"question": "a", "completion": "b"}, "prompt_completion", "Did you mean dataset.columns.prompt=question?"),
        ({"prompt": "a", "completions": "b"}, "prompt_completion", "dataset.columns.completion=completions?"),
        ({"content": "a"}, "text", "Did you mean dataset.columns.text=content?"),
        ({"conversation": []}, "messages", "Did you mean dataset.columns.messages=conversation?"),
        ({"conversation": []}, "sharegpt", "Did you mean dataset.columns.conversations=conversation?"),
        ({"instructions": "a", "output": "b"}, "alpaca", "Did you mean dataset.columns.instruction=instructions?"),
        ({"quotes": "a", "author": "b"}, "quotes", "Did you mean dataset.columns.quote=quotes?"),
    ],
)
def test_column_that_the_format_lacks_is_named_with_the_nearest(row, form, hint):
    message = refusal(row, format=DataFormat(form))
    assert "there is no column" in message
    assert f"the columns are {', '.join(row)}" in message
    assert hint in message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3, "completion": "b"}, "column prompt holds int where text is needed"),
        ({"prompt": "a", "completion": None}, "column completion holds NoneType where text is needed"),
        ({"prompt": " \n", "completion": "b"}, "column prompt is empty"),
        ({"prompt": "a", "completion": ""}, "column completion is empty"),
        ({"text": ""}, "column text is empty"),
        ({"instruction": "a", "output": ["b"]}, "column output holds list where text is needed"),
        ({"quote": "a", "author": ""}, "column author is empty"),
        ({"prompt": "a", "completion": "b \ud83d"}, "column completion holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "is empty"),
        ({"conversations": [{"from": "human", "value": "\udc00"}]}, "holds half of a surrogate pair"),
        ({"messages": "hello"}, "column messages is no list of turns"),
        ({"messages": []}, "column messages is no list of turns"),
        ({"messages": ["hello"]}, 'a turn of messages is not {"role": "...", "content": "..."}'),
        ({"messages": [{"role": "user"}]}, 'a turn of messages is not {"role": "...", "content": "..."}'),
        ({"conversations": [{"role": "user", "content": "a"}]}, 'is not {"from": "...", "value": "..."}'),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "a turn is from 'tool'; known are human, user, gpt"),
    ],
)
def test_value_that_is_no_text_is_refused_by_column(row, said):
    assert said in refusal(row)


@pytest.mark.parametrize(
    "roles",
    [
        ["user"],
        ["assistant"],
        ["user", "assistant", "user"],
        ["user", "user", "assistant"],
        ["assistant", "user", "assistant"],
        ["user", "tool", "assistant"],
        ["system"],
    ],
    ids=" ".join,
)
def test_turns_that_do_not_alternate_up_to_an_answer_are_refused(roles):
    message = refusal({"messages": [{"role": role, "content": "a"} for role in roles]})
    assert "the turns must go user, assistant, ..., and end with an answer" in message
    assert ", ".join(role for role in roles if role != "system") in message


def test_guanaco_row_without_an_answer_is_refused():
    assert "end with an answer" in refusal({"text": "### Human: Is anybody there?"})
