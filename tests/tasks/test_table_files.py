"""CSV as programs write it, in any encoding, and Excel workbooks."""

from __future__ import annotations

import builtins
import csv
import datetime
import io
import random

import pytest
from task_helpers import config_of

from braidlora.config import DataSource, RunConfig, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.tasks import load_tasks
from braidlora.tasks.read import describe, read_rows

GERMAN = [{"Text": "Müllabfuhr kam nicht,\nschon wieder", "Preis": "3,50", "Label": "Beschwerde"},
          {"Text": 'er sagte "nein"; warum?', "Preis": "1.200,00", "Label": "Größe"}]  # fmt: skip


def write(path, rows, delimiter=",", encoding="utf-8", start=""):
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\r\n")
    table.writeheader()
    table.writerows(rows)
    path.write_bytes((start + text.getvalue()).encode(encoding))
    return str(path)


def columns(path, **options):
    return [row.columns for row in read_rows(DataSource(source=str(path), **options), "train")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16", "utf-16-le", "utf-32"]
)
def test_delimiter_and_encoding_are_detected(tmp_path, delimiter, encoding):
    """Quoted line breaks, decimal commas and delimiters in cells do not mislead."""
    path = write(tmp_path / "rows.csv", GERMAN, delimiter, encoding)
    assert columns(path) == GERMAN
    name = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}[delimiter]
    found = {"latin-1": "cp1252", "utf-8-sig": "utf-8"}.get(encoding, encoding)
    assert describe(DataSource(source=path)) == f"CSV, delimiter {name}, encoding {found} (both detected)"


def test_given_settings_are_used_and_reported(tmp_path):
    path = write(tmp_path / "rows.csv", GERMAN, ";", "cp1252")
    source = DataSource(source=path, delimiter=";", encoding="CP1252")
    assert describe(source) == "CSV, delimiter semicolon, encoding cp1252 (as given)"
    one = DataSource(source=path, delimiter=";")
    assert describe(one) == "CSV, delimiter semicolon, encoding cp1252 (encoding detected)"
    assert columns(write(tmp_path / "odd.csv", GERMAN, "~"), delimiter="~") == GERMAN
    tabbed = write(tmp_path / "rows.tsv", GERMAN, "\t")
    assert columns(tabbed, delimiter="tab") == columns(tabbed) == GERMAN


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет, как дела? Заказ не пришёл, помогите пожалуйста", "cp1251"),
        ("Привет, где мой заказ? Я жду его уже три недели и хочу вернуть деньги", "koi8-r"),
    ],
)
def test_other_old_encodings_are_detected_where_the_text_is_clear(tmp_path, text, encoding):
    path = write(tmp_path / "rows.csv", [{"text": text, "label": "a"}] * 5, ";", encoding)
    assert columns(path)[0]["text"] == text


def test_an_unclear_encoding_is_refused_and_can_be_given(tmp_path):
    path = write(
        tmp_path / "rows.csv", [{"text": "你好世界，订单没有到", "label": "投诉"}] * 3, ",", "gb18030"
    )
    with pytest.raises(
        DataError, match=r"is not UTF-8 text, and its encoding is unclear. It could be .*Name it"
    ):
        columns(path)
    assert columns(path, encoding="gb18030")[0]["label"] == "投诉"
    with pytest.raises(
        DataError, match=r"rows\.csv:1: is not text in the encoding utf-8-sig.*Set `encoding`"
    ):
        columns(path, encoding="utf-8-sig")
    polish = [{"text": "Zamówienie jeszcze nie dotarło, proszę o szybką pomoc", "label": "a"}] * 5
    with pytest.raises(DataError, match="encoding is unclear"):  # Central European, Baltic, …
        columns(write(tmp_path / "polish.csv", polish, ";", "cp1250"))


def test_damaged_utf8_stays_utf8_and_names_the_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("instruction,output\né,ü\n".encode() + b"\xff,d\n" + "ö,ä\n".encode())
    with pytest.raises(DataError, match=r"rows\.csv:3: .*not UTF-8 text; save the file as UTF-8"):
        load_tasks(config_of(str(path)))


def test_excels_line_with_the_delimiter(tmp_path):
    path = write(tmp_path / "rows.csv", GERMAN, ";", start="sep=;\r\n")
    assert columns(path) == GERMAN
    assert [row.place.rpartition(":")[2] for row in read_rows(DataSource(source=path), "train")] == ["3", "5"]


def test_a_single_column_and_a_file_without_rows(tmp_path):
    assert columns(write(tmp_path / "one.csv", [{"text": "a; b"}])) == [{"text": "a; b"}]
    (tmp_path / "none.csv").write_text("a;b\n")
    assert columns(tmp_path / "none.csv") == []
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv:1: empty file; expected a CSV header"):
        columns(tmp_path / "empty.csv")


def test_a_cell_too_many_names_the_delimiter(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction;output\na;b\nc;d;e\n")
    with pytest.raises(
        DataError, match=r"rows\.csv:3: expected 2 cells as in the header, got 3 \(delimiter semicolon; a"
    ):
        load_tasks(config_of(str(path)))


def test_random_tables_in_random_dialects(tmp_path):
    draw = random.Random(1)
    for number in range(40):
        pieces = ["word", "é", ",", ";", "|", '"', "\n", " ", "1,5", "ß"]
        rows = [
            {
                "id": str(at),
                "text": "x" + "".join(draw.choices(pieces, k=draw.randrange(1, 9))),
                "label": draw.choice("ab"),
            }
            for at in range(draw.randrange(3, 12))
        ]
        path = write(
            tmp_path / f"{number}.csv", rows, draw.choice(",;\t|"), draw.choice(["utf-8", "cp1252", "utf-16"])
        )
        assert columns(path) == rows


def test_json_in_utf16_and_in_a_given_encoding(tmp_path):
    row = '{"instruction": "é", "output": "b"}\n'
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-16")
    (tmp_path / "a.json").write_text(f"[{row}]", encoding="utf-16")
    (tmp_path / "b.jsonl").write_text(row, encoding="cp1252")
    for name, options in (("a.jsonl", {}), ("a.json", {}), ("b.jsonl", {"encoding": "cp1252"})):
        assert columns(tmp_path / name, **options) == [{"instruction": "é", "output": "b"}]
    assert describe(DataSource(source=str(tmp_path / "a.jsonl"))) == "encoding utf-16"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "a.jsonl",
            {"delimiter": ";"},
            "`delimiter` applies to CSV files, and this is read as jsonl. Remove it",
        ),
        (
            "a.xlsx",
            {"encoding": "cp1252"},
            "`encoding` applies to CSV and JSON files, and this is read as xlsx",
        ),
        ("a.csv", {"sheet": "x"}, "`sheet` applies to Excel workbooks, and this is read as csv"),
        ("a.xls", {}, "unknown file name suffix. Expected .json.*Save an .xls workbook as .xlsx or CSV"),
    ],
)
def test_settings_that_do_not_fit_the_file(tmp_path, name, options, message):
    (tmp_path / name).write_bytes(b"a")
    with pytest.raises(DataError, match=message):
        columns(tmp_path / name, **options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("delimiter", ";;", "got ';;'; expected one character that is not a letter"),
        ("delimiter", '"', "expected one character"),
        ("encoding", "klingon", "got 'klingon'; expected an encoding such as utf-8"),
        ("encoding", "base64", "got 'base64'; expected an encoding"),
    ],
)
def test_impossible_settings_are_rejected_in_the_recipe(tmp_path, key, value, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"tasks:\n  - {{name: t, train: {{source: a.csv, {key}: '{value}'}}}}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [], RunConfig)


@pytest.mark.parametrize(
    ("header", "task", "message"),
    [
        ("Instruction,Output", {}, "no column 'instruction' for `instruction` (the columns are Instruction, Output). "
         "Did you mean 'Instruction'? Then set tasks.t.columns.instruction=Instruction (task t, train)."),
        ("instruction ,output", {}, "Did you mean 'instruction '? Then set tasks.t.columns.instruction='instruction '"),
        ("prompt,completion", {}, "Did you mean 'prompt'? Then set tasks.t.columns.instruction=prompt"),
        ("instruction,Response", {}, "Did you mean 'Response'? Then set tasks.t.columns.output=Response"),
        ("instructon,output", {}, "Did you mean 'instructon'?"),
        ("x,y", {}, "no column 'instruction' for `instruction` (the columns are x, y); name its column in tasks.t."),
        ("Body,Queue", {"columns": {"instruction": "body", "output": "queue"}}, "no column 'body', which "
         "tasks.t.columns.instruction names (the columns are Body, Queue). Did you mean 'Body'?"),
        ("Sentence,Klasse", {"kind": "classify"}, "Did you mean 'Sentence'? Then set tasks.t.columns.text=Sentence"),
    ],
)  # fmt: skip
def test_a_missing_column_says_which_was_meant(tmp_path, header, task, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\na,b\n")
    with pytest.raises(DataError) as caught:
        load_tasks(config_of(str(path), task=task))
    assert message in str(caught.value)
    assert "bad_rows" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "given", "found"),
    [("a;b", ",", "a semicolon"), ("a\tb", ";", "a tab"), ("a,b", "|", "a comma")],
)
def test_a_wrong_delimiter_is_named_as_such(tmp_path, header, given, found):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\nx{header[1]}y\n")
    config = config_of(
        {"source": str(path), "delimiter": given}, task={"columns": {"instruction": "a", "output": "b"}}
    )
    with pytest.raises(DataError) as caught:
        load_tasks(config)
    assert (
        f"no column 'a': the header is a single cell, {header!r}. Cells seem to be separated by {found}; "
        in str(caught.value)
    )
    assert "remove `delimiter` from the recipe" in str(caught.value)


def test_a_filter_on_a_missing_column_says_which_was_meant(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output,Lang\na,b,en\n")
    with pytest.raises(
        DataError, match=r"there is no column 'lang' \(the columns are .*\); did you mean 'Lang'\?"
    ):
        load_tasks(config_of({"source": str(path), "where": {"lang": "en"}}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"instruction": "a", "output": "b"},\n{"instruction": "a" "output": "b"}]',
         "a.json:2: not valid JSON: expecting ',' delimiter"),
        ("a.json", '[{"instruction": "a", "output": "b"},\n', "a.json:2: not valid JSON"),
        ("a.json", '{"instruction": "a", "output": "b"}',
         "a.json:1: expected a list of rows, [{…}, {…}]. It looks like JSON Lines"),
        ("a.json", '[{"instruction": "a", "input": "c", "output": ""}]',
         "a.json:1: the column 'output' (`output`) is empty"),
        ("a.json", '[{"instruction": "", "input": "", "output": "b"}]',
         "a.json:1: the column 'instruction' (`instruction`) is empty"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: expected an object with named columns, got [1, 2]"),
        ("a.jsonl", '{"instruction": "a", "output": "b"},\n', "a.jsonl:1: not valid JSON: extra data"),
    ],
)  # fmt: skip
def test_mistakes_in_alpaca_files_name_file_and_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_tasks(config_of(str(path)))
    assert message in str(caught.value)


@pytest.fixture
def workbook(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl: pip install 'braidlora[xlsx]'")

    def make(**sheets):
        book = openpyxl.Workbook()
        book.remove(book.active)
        for name, rows in sheets.items():
            sheet = book.create_sheet(name)
            for row in rows:
                sheet.append(row)
        path = tmp_path / "rows.xlsx"
        book.save(path)
        return str(path)

    return make


def test_a_workbook_is_read_by_sheet(workbook):
    rows = [["text", "label", "when"], ["größe", 3, datetime.datetime(2026, 1, 2)], [], ["b", 1.5, None]]
    path = workbook(First=rows, Other=[["text"], [True]])
    first = [
        {"text": "größe", "label": 3, "when": "2026-01-02"},
        {"text": "b", "label": 1.5, "when": None},
    ]
    assert columns(path) == first
    assert columns(path, sheet="Other") == [{"text": True}]
    places = [row.place for row in read_rows(DataSource(source=path), "train")]
    assert places == [f"{path}[First]:2", f"{path}[First]:4"]
    task = {"kind": "classify", "columns": {"label": "label"}}
    assert [row["label"] for row in load_tasks(config_of(path, task=task))[0].train] == ["3", "1.5"]


def test_mistakes_in_a_workbook(workbook, tmp_path):
    with pytest.raises(DataError, match=r"no sheet 'Tickets'; the sheets are 'A', 'B'. Set `sheet`"):
        columns(workbook(A=[["a"]], B=[["a"]]), sheet="Tickets")
    with pytest.raises(DataError, match=r"\[A\]:1: column 2 has no name"):
        columns(workbook(A=[["a", None, "c"], [1, 2, 3]]))
    with pytest.raises(DataError, match=r"\[A\]:1: the first row of the sheet has duplicate columns: a"):
        columns(workbook(A=[["a", "a"], [1, 2]]))
    with pytest.raises(DataError, match=r"\[A\]: is empty; expected a first row"):
        columns(workbook(A=[]))
    path = workbook(A=[["instruction", "output"], ["#N/A", "b"], ["a", "b", "c"]])
    problems = [row.problem for row in read_rows(DataSource(source=path), "train")]
    assert problems == ["cell A2 has the error #N/A", "expected 2 cells as in the first row, got 3"]
    for content, more in (
        (b"text", ""),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old .xls format; save it as .xlsx"),
    ):
        (tmp_path / "no.xlsx").write_bytes(content)
        with pytest.raises(DataError, match=f"not readable as an Excel workbook.*{more}"):
            columns(tmp_path / "no.xlsx")


def test_without_openpyxl_the_message_says_what_to_install(workbook, monkeypatch):
    path, real = workbook(A=[["a"], [1]]), builtins.__import__

    def without(name, *rest):
        if name == "openpyxl":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"needs openpyxl: pip install 'braidlora\[xlsx\]'. Or save the sheet as CSV"
    ):
        columns(path)
