"""Data files as people have them: what can be read is read in order; what cannot says what, where, what to type."""

import codecs
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llama_lab.choices import DataFormat
from llama_lab.data import json_rows
from llama_lab.data.files import CHECKED_ROWS, check_file, check_package, expanded
from llama_lab.data.readers import read_rows, scan_rows
from llama_lab.dataset_config import ColumnSettings, DatasetSettings
from llama_lab.errors import DataError

ROWS = [{"prompt": f"number {i}", "completion": f"answer {i}"} for i in range(3)]
GOOD = json.dumps(ROWS[0])


def jsonl(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


TABLE = "prompt,completion\na,b\n"

# What a file holds, the settings beside its path, and what the one message must hold beside its name.
BROKEN: dict[str, tuple[str | bytes, dict[str, Any], list[str]]] = {
    # bytes
    "empty.jsonl": ("", {}, ["is empty", "at least two rows"]),
    "empty.csv": ("", {}, ["is empty"]),
    "blank.jsonl": ("\n  \n\n", {}, ["holds no rows", "at least two"]),
    "blank.json": (" \n", {}, ["holds no rows"]),
    "blank.csv": ("\n\n", {}, ["holds no rows"]),
    "header_alone.csv": ("prompt,completion\n", {}, ["holds no rows"]),
    "latin1.jsonl": (
        jsonl(GOOD).encode() + '{"prompt": "é"}'.encode("latin-1"),
        {},
        ["line 2 is not UTF-8", "as UTF-8"],
    ),
    "latin1.json": ('[\n{"prompt": "é"}]'.encode("latin-1"), {}, ["line 2 is not UTF-8"]),
    "latin1.csv": ("prompt,completion\né,b\n".encode("latin-1"), {}, ["line 2 is not UTF-8"]),
    "utf16.jsonl": (jsonl(*ROWS).encode("utf-16"), {}, ["is UTF-16", "Save it as UTF-8"]),
    "nul.jsonl": (jsonl(GOOD, "\0" * 20), {}, ["line 2 holds NUL bytes", "Write it again"]),
    "nul_inside.jsonl": (jsonl(GOOD, '{"prompt": "a\0", "completion": "b"}'), {}, ["line 2 holds NUL bytes"]),
    "nul.csv": (TABLE + "a\0,b\n", {}, ["line 3 holds NUL bytes"]),
    # JSON and JSONL
    "list.jsonl": (json.dumps(ROWS), {}, ["line 1 begins a list", "Name the file .json"]),
    "printed_list.jsonl": (json.dumps(ROWS, indent=2), {}, ["line 1 begins a list", "Name the file .json"]),
    "object.json": (GOOD, {}, ["holds no list of rows", "name it .jsonl"]),
    "lines.json": (jsonl(*ROWS), {}, ["holds no list of rows", "name it .jsonl"]),
    "number.json": ("3", {}, ["holds no list of rows"]),
    "torn_object.json": ('{"data" [', {}, ["holds no list of rows"]),
    "text.jsonl": (jsonl(GOOD, '"prompt"'), {}, ["line 2 is no JSON object", '{"prompt": "...", "completion": "..."}']),
    "numbers.json": ("[1, 2, 3]", {}, ["line 1 is no JSON object"]),
    "torn.jsonl": (jsonl(GOOD) + GOOD[:20], {}, ["line 2, the last one, breaks off", "Write the file again"]),
    "torn.json": (
        json.dumps(ROWS)[:-20],
        {},
        ["row 3 begins at byte 101", "breaks off at byte 130", "2 rows before it"],
    ),
    "torn_first.json": ('[{"prompt": "a', {}, ["row 1 begins at byte 1 ", "No row before it is whole"]),
    "comma.jsonl": (jsonl(GOOD, '{"prompt": "a" "completion": "b"}'), {}, ["line 2 is not JSON", "column 16"]),
    "comma.json": (f"[\n{GOOD}\n{GOOD}\n]", {}, ["line 3 is not JSON", "what follows is not read"]),
    "more.json": (f"[{GOOD}, {GOOD}]\n[]", {}, ["line 2 is not JSON", "the list has ended, and more follows"]),
    "twice.jsonl": (
        jsonl(GOOD, '{"prompt": "a", "prompt": "b", "completion": "c"}'),
        {},
        ["line 2 has the key prompt twice"],
    ),
    "twice.json": (f'[{GOOD},\n{{"prompt": "a", "prompt": "b"}}]', {}, ["line 2 has the key prompt twice"]),
    "nan.jsonl": (jsonl(GOOD, '{"prompt": "a", "completion": NaN}'), {}, ["line 2 holds NaN", "Write null"]),
    "infinity.json": (f'[{GOOD}, {{"prompt": -Infinity}}]', {}, ["holds -Infinity", "Write null"]),
    "digits.jsonl": (
        jsonl(GOOD, f'{{"prompt": {"9" * 5000}}}'),
        {},
        ["line 2 holds a number of more than 4300 digits"],
    ),
    "digits.json": (f'[{GOOD}, {{"prompt": {"9" * 5000}}}]', {}, ["row 2 holds a number of more than 4300 digits"]),
    "deep.jsonl": (jsonl(GOOD, '{"a":' * 100_000), {}, ["line 2 is nested too deeply"]),
    "deep.json": ("[" * 100_000, {}, ["row 1 is nested too deeply"]),
    # tables
    "no_header.csv": (
        "Name one.,Paris.\nAnother.,Lima.\n",
        {},
        ["Name one., Paris.", "fit no format", "The first line"],
    ),
    "short.csv": (TABLE + "a\n", {}, ["line 3 has 1 value,", "names 2 columns", "double quotes"]),
    "long.csv": (TABLE + "a,b,c\n", {}, ["line 3 has 3 values"]),
    "quote.csv": (TABLE + '"a,b\nc,d\n', {}, ["line 3 opens a quote", "line 4"]),
    "inner_quote.csv": (TABLE + '"a"b,c\n', {}, ["line 3 is not CSV", "written twice"]),
    "nameless.csv": (",prompt,completion\n0,a,b\n", {}, ["line 1 gives column 1 no name", "index=False"]),
    "twice.csv": ("prompt,prompt\na,b\n", {}, ["line 1 names the column prompt twice"]),
    "semicolons.csv": ("prompt;completion\na;b\n", {}, ["is one column, 'prompt;completion'", "by commas"]),
    "tabs.csv": ("prompt\tcompletion\na\tb\n", {}, ["is one column", "Name the file .tsv"]),
    "commas.tsv": (TABLE, {}, ["is one column", "Name the file .csv"]),
    "short.tsv": ("prompt\tcompletion\na\n", {}, ["line 2 has 1 value,"]),
    "text.parquet": ("not Parquet at all", {}, ["is none", ".jsonl, .json, .csv"]),
    "torn.parquet": (parquet(ROWS)[:-40], {}, ["breaks off", "Get it again"]),
    "damaged.parquet": (b"PAR1" + b"\0" * 300 + parquet(ROWS)[-400:], {}, ["Parquet", "Get it again"]),
    # names
    "rows.txt": (jsonl(*ROWS), {}, ["must end in one of .jsonl, .json, .csv, .tsv, .parquet"]),
    "rows.jsonl.gz": (b"\x1f\x8b", {}, ["is packed", "Unpack it"]),
    # rows
    "one.jsonl": (GOOD, {}, ["holds one row", "at least two"]),
    "columns.jsonl": (
        jsonl({"question": "a", "answer": "b"}),
        {},
        ["row 1", "dataset.columns.prompt=question dataset.columns.completion=answer"],
    ),
    "nearest.jsonl": (
        jsonl({"promt": "a", "completion": "b"}),
        {"format": DataFormat.prompt_completion},
        ["no column prompt", "dataset.columns.prompt=promt"],
    ),
    "mapped.jsonl": (GOOD, {"columns": ColumnSettings(prompt="asked")}, ["fit no format"]),
    "lacking.jsonl": (jsonl(GOOD, {"prompt": "a"}), {}, ["row 2", "no column completion", "skip_bad_rows=true"]),
    "null.jsonl": (jsonl(GOOD, {"prompt": None, "completion": "b"}), {}, ["row 2", "column prompt holds null"]),
    "number.jsonl": (jsonl(GOOD, {"prompt": 7, "completion": "b"}), {}, ["row 2", "column prompt holds int"]),
    "list_of.jsonl": (jsonl(GOOD, {"prompt": "a", "completion": ["b"]}), {}, ["row 2", "column completion holds list"]),
    "no_answer.jsonl": (jsonl(GOOD, {"prompt": "a", "completion": " "}), {}, ["row 2", "column completion is empty"]),
    "surrogate.jsonl": (jsonl(GOOD, '{"prompt": "\\ud800", "completion": "b"}'), {}, ["row 2", "surrogate"]),
    "messages.jsonl": (jsonl({"messages": "hello"}), {}, ["row 1", "column messages is no list of turns"]),
    "roleless.jsonl": (
        jsonl({"messages": [{"content": "a"}]}),
        {},
        ["row 1", 'is not {"role": "...", "content": "..."}'],
    ),
    "contentless.jsonl": (jsonl({"messages": [{"role": "user"}]}), {}, ["row 1", 'is not {"role": "...", "content"']),
    "role.jsonl": (
        jsonl(chat("user", "tool", "assistant")),
        {},
        ["the role 'tool'", "Roles are user, assistant, system"],
    ),
    "two_users.jsonl": (jsonl(chat("user", "user", "assistant")), {}, ["turn 2 is in the wrong place"]),
    "unanswered.jsonl": (jsonl(chat("user")), {}, ["no turn is an answer"]),
    "from.jsonl": (
        jsonl({"conversations": [{"from": "humna", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        {},
        ["from 'humna'", "Did you mean human?"],
    ),
    "same.jsonl": (
        jsonl({"prompt": "a", "chosen": "b", "rejected": "b"}),
        {},
        ["preferences (chosen, rejected)", "dataset.columns.completion=chosen"],
    ),
    "label.jsonl": (
        jsonl({"prompt": "a", "completion": "b", "label": "good"}),
        {"format": DataFormat.unpaired_preference},
        ["dataset.format=prompt_completion"],
    ),
    "no_label.jsonl": (
        jsonl({"prompt": "a", "completion": "b", "lable": True}),
        {"format": DataFormat.unpaired_preference},
        ["no column label", "dataset.columns.label=lable"],
    ),
}


@pytest.fixture
def refusal(tmp_path):
    """refusal(path, **dataset settings): the message with which a file or folder of tmp_path is refused."""

    def refusal(name: str = "", **kwargs: Any) -> str:
        path = tmp_path / name
        with pytest.raises(DataError) as caught:
            check_file(path, DatasetSettings(path=str(path), **kwargs))
        return str(caught.value)

    return refusal


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_has_one_clear_message(tmp_path, refusal, name):
    content, kwargs, said = BROKEN[name]
    write(tmp_path, **{name: content})
    message = refusal(name, **kwargs)
    assert name in message
    assert [words for words in said if words not in message] == [], message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


def test_there_are_thirty_ways_to_break_a_file():
    assert len(BROKEN) >= 30


# Folders and names


def test_folder_is_read_file_by_file_in_the_order_of_names(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(6)]
    write(tmp_path, **{f"part-{i}.jsonl": jsonl(*rows[2 * i : 2 * i + 2]) for i in (2, 0, 1)})
    write(tmp_path, **{"README.md": "Not data.", ".hidden.csv": "Nor this."})
    assert check_file(tmp_path, DatasetSettings(path=str(tmp_path))) is DataFormat.prompt_completion


def test_fault_in_a_folder_names_the_file_and_its_row(tmp_path, refusal):
    write(tmp_path, **{"a.jsonl": jsonl(*ROWS), "b.jsonl": jsonl(ROWS[0], {"prompt": 1, "completion": "b"})})
    assert f"{tmp_path / 'b.jsonl'}, row 2: column prompt holds int" in refusal()
    write(tmp_path, **{"b.jsonl": jsonl(ROWS[0], "{")})
    assert f"{tmp_path / 'b.jsonl'}, line 2 is not JSON" in refusal()


def test_folder_without_data_is_refused(tmp_path, refusal):
    write(tmp_path, **{"README.md": "Hello."})
    assert "is a folder without .jsonl, .json, .csv, .tsv, .parquet files" in refusal()
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", **{"rows.csv": TABLE})
    assert f"Did you mean dataset.path={tmp_path / 'data'}?" in refusal()


def test_folder_of_several_kinds_is_refused(tmp_path, refusal):
    write(tmp_path, **{"a.csv": TABLE, "b.jsonl": jsonl(*ROWS)})
    message = refusal()
    assert "a folder with files of several kinds: .csv, .jsonl" in message
    assert f"dataset.path={tmp_path / 'a.csv'}" in message


def test_empty_file_in_a_folder_is_named(tmp_path, refusal):
    write(tmp_path, **{"a.jsonl": jsonl(*ROWS), "b.jsonl": ""})
    assert f"{tmp_path / 'b.jsonl'} is empty" in refusal()


def test_file_that_is_not_there_is_named_with_the_nearest(tmp_path, refusal):
    write(tmp_path, **{"rows.jsonl": jsonl(*ROWS)})
    assert f"there is no such file. Did you mean {tmp_path / 'rows.jsonl'}?" in refusal("rows.json")
    assert "there is no such file" in refusal("nowhere/rows.jsonl")
    assert "there is no such file" in refusal("x" * 300 + ".jsonl")


def test_link_that_leads_to_itself_is_refused(tmp_path, refusal):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert "is a link that leads nowhere, or in a circle" in refusal("a.jsonl")
    assert "is a folder without" in refusal()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read_is_refused(tmp_path, refusal):
    write(tmp_path, **{"rows.jsonl": jsonl(*ROWS)})
    (tmp_path / "rows.jsonl").chmod(0)
    assert "cannot be read: Permission denied" in refusal("rows.jsonl")


def test_home_is_written_out():
    assert expanded("~/rows.jsonl") == Path.home() / "rows.jsonl"
    assert expanded("~nobody_of_that_name/rows.jsonl") == Path("~nobody_of_that_name/rows.jsonl")


# What can be read


def as_table(rows: list[dict[str, str]], sign: str) -> str:
    return "".join(sign.join(values) + "\n" for values in [rows[0].keys(), *(row.values() for row in rows)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(*ROWS)),
        ("rows.jsonl", codecs.BOM_UTF8 + jsonl(*ROWS).encode()),
        ("rows.jsonl", "\n" + jsonl(*ROWS).replace("\n", "\r\n\r\n").rstrip()),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=4)),
        ("rows.json", codecs.BOM_UTF8 + json.dumps({"version": "1.0", "n": [1, {"data": []}], "data": ROWS}).encode()),
        ("rows.JSON", json.dumps({"data": ROWS, "more": 1})),
        ("rows.csv", as_table(ROWS, ",")),
        ("rows.csv", codecs.BOM_UTF8 + as_table(ROWS, ",").replace("\n", "\r\n\r\n").encode()),
        ("rows.tsv", as_table(ROWS, "\t")),
        ("rows.parquet", parquet(ROWS)),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content):
    write(tmp_path, **{name: content})
    assert list(read_rows(tmp_path / name)) == ROWS
    assert check_file(tmp_path / name, DatasetSettings(path="rows")) is DataFormat.prompt_completion


def test_table_keeps_what_stands_in_quotes(tmp_path):
    write(tmp_path, **{"rows.csv": 'prompt,completion\n"a, ""b""\n c",d\n'})
    assert list(read_rows(tmp_path / "rows.csv")) == [{"prompt": 'a, "b"\n c', "completion": "d"}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_json_is_the_same_wherever_the_file_is_parted(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows = [{"a": 'é🙂\\\n"', "b": [1.5e-7, -12, True, None], "c": {"d": {}}}, {"a": "x" * 50}, {}]
    content = json.dumps({"n": 12345, "flag": False, "data": rows}, ensure_ascii=False, indent=1)
    write(tmp_path, **{"rows.json": content})
    assert list(read_rows(tmp_path / "rows.json")) == rows
    for end in range(len(content.encode()) - 10):
        write(tmp_path, **{"rows.json": content.encode()[:end]})
        try:
            found = list(scan_rows(tmp_path / "rows.json"))
        except DataError:
            continue
        assert [row for row in found if isinstance(row, dict)] == rows[: len(found) - 1] or not found


def test_place_where_json_breaks_off_is_told_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 16)
    content = json.dumps([{"a": "é" * 20}] * 3, ensure_ascii=False).encode()
    write(tmp_path, **{"rows.json": content[:-10]})
    *whole, fault = scan_rows(tmp_path / "rows.json")
    begin = content.rindex(b"{")
    assert len(whole) == 2
    assert f"row 3 begins at byte {begin} and breaks off at byte {len(content) - 10}, the end of the file" in str(fault)
    write(tmp_path, **{"rows.json": content[:-3]})  # in the middle of an é: its second byte is missing
    assert f"breaks off at byte {len(content) - 3}" in str(list(scan_rows(tmp_path / "rows.json"))[-1])


def test_rows_around_a_bad_one_are_read(tmp_path):
    bad = {"nan": '{"a": NaN}', "twice": '{"a": {"b": 1, "b": 2}}', "text": '"a"'}
    write(
        tmp_path,
        **{"rows.jsonl": jsonl(GOOD, *bad.values(), GOOD), "rows.json": f"[{GOOD}, {', '.join(bad.values())}, {GOOD}]"},
    )
    write(tmp_path, **{"rows.csv": TABLE + 'x\n"a"b,c\nc,d\n'})
    for name, num_bad in (("rows.jsonl", 3), ("rows.json", 3), ("rows.csv", 2)):
        found = list(scan_rows(tmp_path / name))
        assert [isinstance(row, DataError) for row in found] == [False, *[True] * num_bad, False]


def test_large_json_is_never_in_memory_as_a_whole(tmp_path):
    import tracemalloc

    row = json.dumps({"prompt": "a" * 5000, "completion": "b" * 5000})
    write(tmp_path, **{"rows.json": f"[{', '.join([row] * 3000)}]", "rows.jsonl": jsonl(*[row] * 3000)})
    for name in ("rows.json", "rows.jsonl"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / name)) == 3000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20 < (tmp_path / name).stat().st_size / 3


# The look at the first rows


def test_bad_rows_are_no_fault_where_they_are_skipped(tmp_path):
    write(tmp_path, **{"rows.jsonl": jsonl(*["{"] * 30, *ROWS, {"prompt": 1, "completion": "b"})})
    dataset = DatasetSettings(path="rows", skip_bad_rows=True)
    assert check_file(tmp_path / "rows.jsonl", dataset) is DataFormat.prompt_completion
    write(tmp_path, **{"rows.jsonl": jsonl(*["{"] * 30, ROWS[0])})
    with pytest.raises(DataError, match="holds one row that can be used, of 31"):
        check_file(tmp_path / "rows.jsonl", dataset)
    write(tmp_path, **{"rows.jsonl": jsonl(*["{"] * 30)})
    with pytest.raises(DataError, match="holds no rows that can be used, of 30"):
        check_file(tmp_path / "rows.jsonl", dataset)


def test_empty_rows_are_no_fault(tmp_path):
    empty = {"prompt": " ", "completion": None}
    write(tmp_path, **{"rows.jsonl": jsonl(empty, ROWS[0], empty, ROWS[1])})
    assert check_file(tmp_path / "rows.jsonl", DatasetSettings(path="rows")) is DataFormat.prompt_completion


def test_only_the_first_rows_are_looked_at(tmp_path):
    write(tmp_path, **{"rows.jsonl": (GOOD + "\n") * CHECKED_ROWS + "{\n"})
    assert check_file(tmp_path / "rows.jsonl", DatasetSettings(path="rows")) is DataFormat.prompt_completion


# Packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A Python package that must not be imported, with data in it."""
    folder = tmp_path / "rows_of_somebody"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    write(folder / "data", **{"rows.json": json.dumps(ROWS)})
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_file_of_a_package_is_read_without_importing_it(package):
    dataset = DatasetSettings(package="rows_of_somebody", file="data/rows.json")
    assert check_package(dataset) is DataFormat.prompt_completion
    assert "rows_of_somebody" not in sys.modules


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("rows_of_nobody", "data/rows.json", "Type: python -m pip install rows-of-nobody"),
        ("no.such.package", "data/rows.json", "which is not installed"),
        ("rows_of_somebody", "data/row.json", "Did you mean dataset.file=data/rows.json?"),
        ("rows_of_somebody", "/etc/hostname", "no such file. It has: data/rows.json"),
        ("json", "nothing.json", "no such file. It has: no data"),
    ],
)
def test_package_without_the_file_says_what_to_type(package, name, file, said):
    with pytest.raises(DataError) as caught:
        check_package(DatasetSettings(package=name, file=file))
    assert said in str(caught.value)
