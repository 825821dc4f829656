"""Rows of every format become the chat that they mean, and a row that cannot says what to type instead."""

import pytest

from llama_lab.choices import DataFormat, TrainerName
from llama_lab.data.formats import COLUMNS, detect_format, is_empty
from llama_lab.data.formats import convert as convert_row
from llama_lab.data.preference import check_trainer
from llama_lab.dataset_config import ColumnSettings, DatasetSettings
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
    DataFormat.preference: {"prompt": "France?", "chosen": "Paris.", "rejected": "Lyon.", "score_chosen": 9.5},
    DataFormat.unpaired_preference: {"prompt": "France?", "completion": "Lyon.", "label": False},
    DataFormat.prompt: {"prompt": "France?", "source": "a quiz"},
}
"""One row of ours in every format."""


def turns(*written: str) -> list[dict[str, str]]:
    """Messages written as "user: ..."."""
    split = [turn.split(": ", 1) for turn in written]
    return [{"role": role, "content": content} for role, content in split]


def chat(*written: str) -> dict[str, list[dict[str, str]]]:
    """{"messages": ...} of turns written as "user: ..."."""
    return {"messages": turns(*written)}


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
    DataFormat.preference: {
        "prompt": turns("user: France?"),
        "chosen": turns("assistant: Paris."),
        "rejected": turns("assistant: Lyon."),
    },
    DataFormat.unpaired_preference: {
        "prompt": turns("user: France?"),
        "completion": turns("assistant: Lyon."),
        "label": False,
    },
    DataFormat.prompt: {"prompt": turns("user: France?")},
}
"""What the rows mean."""


def example_of(row, form, dataset):
    return convert_row(row, form, dataset)[0]


def settings(**kwargs) -> DatasetSettings:
    kwargs["columns"] = ColumnSettings(**kwargs.get("columns", {}))
    return DatasetSettings(path="rows.jsonl", **kwargs)


def convert(row: dict, **kwargs) -> dict:
    """The example of a row, its format read from its columns."""
    dataset = settings(**kwargs)
    return example_of(row, detect_format(row, dataset), dataset)


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
    assert example_of(ROWS[form], form, settings()) == EXAMPLES[form]


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
    assert example_of(row, DataFormat(form), dataset) == example_of(renamed, DataFormat(form), settings())


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
        ({"prompt": "a", "completion": None}, "column completion holds null where text is needed"),
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
        ["user", "user"],
        ["user", "user", "assistant"],
        ["user", "assistant", "assistant"],
        ["user", "assistant", "system", "assistant"],
        ["assistant", "user", "assistant"],
        ["user", "tool", "assistant"],
        ["system"],
    ],
    ids=" ".join,
)
def test_turns_that_do_not_alternate_up_to_an_answer_are_refused(roles):
    message = refusal({"messages": [{"role": role, "content": "a"} for role in roles]})
    assert "The turns must go user, assistant, ..., and end with an answer" in message
    assert f"here: {', '.join(roles)}. Roles are" in message


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["user"], "no turn is an answer"),
        (["system", "user", "user", "assistant"], "turn 3 is in the wrong place"),
        (["user", "assistant", "assistant"], "turn 3 is in the wrong place"),
        (["user", "asistant"], "a turn has the role 'asistant'. Did you mean assistant?"),
        (
            ["user", "assistant"] * 50 + ["assistant"],
            "here: user, assistant, user, assistant, user, assistant, user, assis",
        ),
    ],
)
def test_wrong_turn_is_named(roles, said):
    assert said in refusal({"messages": [{"role": role, "content": "a"} for role in roles]})


def test_guanaco_row_without_an_answer_is_refused():
    assert "end with an answer" in refusal({"text": "### Human: Is anybody there?"})


# Turns that are left out


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("user assistant", "user assistant"),
        ("user assistant user", "user assistant"),
        ("user assistant user user", "user assistant"),
        ("system user assistant user", "system user assistant"),
    ],
)
def test_question_that_nobody_answered_is_left_out_and_told(roles, kept):
    row = {"messages": [{"role": role, "content": role} for role in roles.split()]}
    example, was_trimmed = convert_row(row, DataFormat.messages, settings())
    assert " ".join(turn["role"] for turn in example["messages"]) == kept
    assert was_trimmed == (roles != kept)


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("gpt human gpt", "user assistant"),
        ("system gpt human gpt human", "system user assistant"),
        ("human gpt human", "user assistant"),
    ],
)
def test_sharegpt_answer_whose_question_stands_in_another_row_is_left_out(roles, kept):
    row = {"conversations": [{"from": role, "value": role} for role in roles.split()]}
    example, was_trimmed = convert_row(row, DataFormat.sharegpt, settings())
    assert " ".join(turn["role"] for turn in example["messages"]) == kept
    assert was_trimmed


def test_sharegpt_row_of_one_answer_alone_is_refused():
    assert "is in the wrong place" in refusal({"conversations": [{"from": "gpt", "value": "a"}]})


# Rows that say nothing


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "completion": " \n"},
        {"prompt": None, "completion": None},
        {"text": "\t"},
        {"messages": []},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]},
        {"conversations": None},
        {"prompt": "", "completion": "", "label": True},
        {"chosen": "", "rejected": None, "prompt": ""},
    ],
    ids=str,
)
def test_row_without_any_text_is_empty(row):
    assert is_empty(row, detect_format(row, settings()), settings())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": ""},
        {"prompt": "", "completion": "b"},
        {"prompt": 0, "completion": ""},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    ],
    ids=str,
)
def test_row_with_half_of_what_it_needs_is_a_fault_and_not_empty(row):
    assert not is_empty(row, detect_format(row, settings()), settings())
    refusal(row)


# What the first rows tell


def test_guanaco_is_read_from_most_of_the_first_rows():
    talk, text = {"text": "### Human: a### Assistant: b"}, {"text": "Once upon a time"}
    assert detect_format(text, settings(), [talk, talk]) is DataFormat.guanaco
    assert detect_format(talk, settings(), [text, text]) is DataFormat.text


def test_label_that_is_no_verdict_makes_no_preference():
    row = {"prompt": "a", "completion": "b", "label": 3}
    assert detect_format(row, settings()) is DataFormat.prompt_completion
    assert detect_format(row | {"label": "False"}, settings()) is DataFormat.unpaired_preference


# Preferences


ASKED = turns("system: Be brief.", "user: France?", "assistant: What of it?", "user: Its capital.")


def preference(row: dict, **kwargs) -> dict:
    return example_of(row, DataFormat.preference, settings(**kwargs))


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Its capital."}], ids=["no prompt", "a prompt"])
def test_shared_beginning_of_two_conversations_is_the_prompt(prompt):
    row = {"chosen": [*ASKED, *turns("assistant: Paris.")], "rejected": [*ASKED, *turns("assistant: Lyon.")], **prompt}
    wanted = {"prompt": ASKED, "chosen": turns("assistant: Paris."), "rejected": turns("assistant: Lyon.")}
    assert preference(row) == wanted


def test_conversations_that_part_at_a_question_go_on_with_their_answers():
    ends = ("user: Peru?", "assistant: Lima."), ("user: Chile?", "assistant: Santiago.")
    row = {
        name: turns("user: France?", "assistant: Paris.", *end)
        for name, end in zip(("chosen", "rejected"), ends, strict=True)
    }
    assert preference(row) == {
        "prompt": turns("user: France?"),
        "chosen": turns("assistant: Paris.", *ends[0]),
        "rejected": turns("assistant: Paris.", *ends[1]),
    }


def test_conversation_of_which_one_answer_begins_the_other_keeps_both():
    row = {
        "chosen": turns("user: a", "assistant: b"),
        "rejected": turns("user: a", "assistant: b", "user: c", "assistant: d"),
    }
    assert preference(row)["prompt"] == turns("user: a")
    assert preference(row)["chosen"] == turns("assistant: b")


def test_prompt_and_answers_may_be_messages():
    row = {"prompt": ASKED, "chosen": turns("assistant: Paris."), "rejected": "Lyon."}
    wanted = {"prompt": ASKED, "chosen": turns("assistant: Paris."), "rejected": turns("assistant: Lyon.")}
    assert preference(row) == wanted


def test_system_prompt_comes_before_the_prompt_of_a_preference():
    found = preference(ROWS[DataFormat.preference], system_prompt="Be brief.")
    assert found["prompt"] == turns("system: Be brief.", "user: France?")
    assert preference({"prompt": ASKED, "chosen": "a", "rejected": "b"}, system_prompt="No.")["prompt"] == ASKED


@pytest.mark.parametrize(("label", "wanted"), [(True, True), ("true", True), (" False", False)])
def test_label_may_be_a_word_of_a_table(label, wanted):
    row = ROWS[DataFormat.unpaired_preference] | {"label": label}
    assert example_of(row, DataFormat.unpaired_preference, settings())["label"] is wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "columns chosen and rejected hold the same"),
        ({"chosen": "b", "rejected": "c"}, "there is no column prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "column rejected holds null where text is needed"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "column chosen is no list of turns"),
        ({"chosen": turns("user: a", "assistant: b"), "rejected": turns("user: c", "assistant: d")}, "the same prompt"),
        (
            {"chosen": turns("user: a", "assistant: b"), "rejected": turns("user: a", "user: d")},
            "column rejected does not",
        ),
        (
            {"prompt": turns("user: a", "assistant: b"), "chosen": "c", "rejected": "d"},
            "prompt does not end with a turn of",
        ),
        ({"prompt": "a", "chosen": turns("gpt: b"), "rejected": "c"}, "a turn has the role 'gpt'"),
    ],
)
def test_preference_that_prefers_nothing_is_refused(row, said):
    with pytest.raises(DataError, match=said):
        preference(row)


@pytest.mark.parametrize("label", [None, 1, "yes", [True]], ids=str)
def test_label_that_is_neither_true_nor_false_is_refused(label):
    row = ROWS[DataFormat.unpaired_preference] | {"label": label}
    assert "it is true for a good answer" in refusal(row, format=DataFormat.unpaired_preference)


def test_preference_columns_of_another_name_are_mapped():
    row = {"q": "France?", "better": "Paris.", "worse": "Lyon."}
    assert "Type dataset.columns.chosen=better dataset.columns.rejected=worse" in refusal(row)
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    assert convert(row, columns=columns) == EXAMPLES[DataFormat.preference]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            ROWS[DataFormat.preference],
            "Type dataset.format=prompt_completion dataset.columns.completion=chosen",
        ),
        (
            {"chosen": turns("user: a", "assistant: b"), "rejected": turns("user: a", "assistant: c")},
            "Type dataset.format=messages dataset.columns.messages=chosen",
        ),
        (ROWS[DataFormat.unpaired_preference], "Type dataset.format=prompt_completion"),
    ],
)
def test_sft_on_preferences_says_how_it_can_learn_from_them(row, words):
    form = detect_format(row, settings())
    with pytest.raises(DataError) as caught:
        check_trainer(form, TrainerName.sft, row, settings())
    assert words in str(caught.value)
    typed = dict(word.removeprefix("dataset.").split("=") for word in words.removeprefix("Type ").split())
    columns = {key.removeprefix("columns."): name for key, name in typed.items() if key.startswith("columns.")}
    dataset = settings(format=DataFormat(typed["format"]), columns=columns)
    check_trainer(detect_format(row, dataset), TrainerName.sft, row, dataset)
    assert example_of(row, dataset.format, dataset)["messages"][-1]["role"] == "assistant"


def test_rows_of_answers_are_for_sft():
    for form, row in ROWS.items():
        if form not in (DataFormat.preference, DataFormat.unpaired_preference, DataFormat.prompt):
            check_trainer(form, TrainerName.sft, row, settings())


# The keys of turns


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "Type dataset.format=sharegpt dataset.columns.conversations=messages",
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            "Type dataset.format=messages dataset.columns.messages=conversations",
        ),
    ],
)
def test_turns_of_the_other_kind_are_told_with_the_words_that_read_them(row, words):
    assert words in refusal(row)
