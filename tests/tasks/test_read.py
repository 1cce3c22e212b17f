"""Rows from every kind of source, and what is said where a source is broken (faults 4 and 6)."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from task_helpers import config_of, questions

from braidlora.config import DataSource
from braidlora.errors import DataError, Interrupted
from braidlora.tasks import load_tasks
from braidlora.tasks.read import read_rows

ROWS = [{"instruction": "a\nb", "output": 'é, "x"'}, {"instruction": "c", "output": "d"}]


def read(source, part="train", **options):
    return list(read_rows(DataSource(source=str(source), **options), part))


def columns(source, **options):
    return [row.columns for row in read(source, **options)]


def places(source):
    return [row.place.rpartition(":")[2] for row in read(source)]


def test_json_list_with_the_line_of_every_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    assert columns(path) == ROWS
    assert places(path) == ["2", "6"]


def test_jsonl_skips_blank_lines_and_keeps_unusual_line_ends_inside_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "line\u2028separator", "output": "x"}
    path.write_bytes(
        ("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n" + json.dumps(ROWS[1])).encode()
    )
    assert columns(path) == [row, ROWS[1]]
    assert places(path) == ["1", "3"]


def test_csv_with_a_line_break_inside_a_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output\n"a\nb","é, ""x"""\n\nc,d\n', encoding="utf-8")
    assert columns(path) == ROWS
    assert places(path) == ["2", "5"]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert columns(path) == ROWS
    assert places(path) == ["1", "2"]


def test_the_format_can_be_given_where_the_name_says_nothing(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text(json.dumps(ROWS[1]), encoding="utf-8")
    with pytest.raises(DataError, match=r"set `format`"):
        read(path)
    assert columns(path, format="jsonl") == [ROWS[1]]


def test_a_folder_saved_by_datasets_with_and_without_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, odd=data.select([1])).save_to_disk(str(tmp_path / "several"))
    assert columns(tmp_path / "one") == ROWS
    assert columns(tmp_path / "several") == ROWS
    assert columns(tmp_path / "several", split="odd") == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'test'; the splits are train, odd"):
        read(tmp_path / "several", part="test")
    with pytest.raises(DataError, match=r"has no splits; remove `split: odd`"):
        read(tmp_path / "one", split="odd")


def test_class_labels_of_a_data_set_become_their_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, None]}, features=features)
    data.save_to_disk(str(tmp_path / "data"))
    assert [row["label"] for row in columns(tmp_path / "data")] == ["good", None]


def test_a_folder_of_another_kind_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"expected a folder saved by `datasets`.*train\.json"):
        read(tmp_path)


def test_a_hub_data_set_is_read_by_name_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(source="owner/name", subset="main")
    assert [row.columns for row in read_rows(source, "test")] == ROWS
    assert asked == [(("owner/name", "main"), {})]  # in particular no trust_remote_code
    with pytest.raises(DataError, match=r"no split 'train'; the splits are test"):
        read("owner/name")


def test_a_wish_to_stop_is_no_data_error(tmp_path, monkeypatch):
    def stopped(*args):
        raise Interrupted("stopped at once by SIGTERM", 15)

    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted):
        read("owner/name")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_from_disk", stopped)
    with pytest.raises(Interrupted):
        read(tmp_path / "saved")


def test_a_hub_name_that_cannot_be_had_is_a_data_error(monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name: no such file or folder .*no route"):
        read("owner/name")


def test_a_data_set_with_its_own_script_is_refused_and_the_script_never_runs(tmp_path, monkeypatch):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="evil"):
        read("evil", format="hub")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "trian.json",
            r"no such file or folder; looked for .*/trian\.json.*Similar names in .*: train\.json",
        ),
        ("sub/dir/train.json", r"looked for .*/sub/dir/train\.json"),
        ("other.csv", r" has test\.json, train\.json"),
        ("./other", r"no such file or folder"),
    ],
)
def test_a_missing_file_says_where_it_was_looked_for_and_what_is_nearby(
    tmp_path, monkeypatch, given, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRAIDLORA_DATA", raising=False)
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=message) as caught:
        read(given)
    assert "BRAIDLORA_DATA, the folder that holds data/ and models/, is not set" in str(caught.value)


def test_the_working_directory_comes_before_the_data_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("BRAIDLORA_DATA", str(there))
    with pytest.raises(DataError) as caught:
        read("data/rows.jsonl")
    assert f"looked for {here}/data/rows.jsonl and {there}/data/rows.jsonl. {there}/data is empty" in str(
        caught.value
    )
    (there / "data" / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    assert columns("data/rows.jsonl") == [ROWS[0]]
    (here / "data").mkdir()
    (here / "data" / "rows.jsonl").write_text(json.dumps(ROWS[1]))
    assert columns("data/rows.jsonl") == [ROWS[1]]
    with pytest.raises(DataError) as caught:
        read(there / "rows.jsonl")
    assert str(caught.value).count("looked for") == 1
    assert " and " not in str(caught.value).partition("looked for")[2].partition(".")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2}', r"rows\.json:1: expected a list of rows.*set `format: jsonl`"),
        ("", r"rows\.json:1: expected a list"),
        ('[{"a": 1},\n {"a": }]', r"rows\.json:2: not valid JSON: expecting value"),
        ('[{"a": 1}\n\n', r"rows\.json:3: not valid JSON: the file ends in the middle"),
        ('[{"a": 1}\n {"a": 2}]', r"rows\.json:2: not valid JSON: expected , or \]"),
        ('[{"a": 1}\n,]', r"rows\.json:2: not valid JSON: expecting value"),
        ('[{"a": 1}]\n[]', r"rows\.json:2: not valid JSON: text after the end"),
        ("[" * 100_000, r"rows\.json:1: not readable JSON"),
        ("[" + "9" * 5000 + "]", r"rows\.json:1: not readable JSON"),
    ],
)
def test_a_broken_json_file_stops_at_its_line_even_when_bad_rows_are_skipped(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tasks(config_of(str(path), prompt={"bad_rows": "skip"}))


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": \n', 2, "not valid JSON"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n[1]\n', 2, "expected an object"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n\n{"instruction": "\xff", "output": "b"}\n', 3, "UTF-8"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "\\ud800", "output": "b"}', 2, "UTF-8"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": null, "output": "b"}', 2, "is null"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "c"}', 2, "no column 'output'"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": NaN}', 2, "is null"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": " "}', 2, "is empty"),
        ("r.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": ["d"]}', 2, "a list"),
        ("r.json", b'[{"instruction": "a", "output": "b"},\n\n7]', 3, "expected an object"),
        ("r.json", b'[{"instruction": "a", "output": "b"},\n{"instruction": "\xe9", "output": "b"}]', 2, "UTF-8"),
        ("r.csv", b"instruction,output\na,b\nc\n", 3, "expected 2 cells as in the header, got 1"),
        ("r.csv", b"instruction,output\na,b\nc,d,e\n", 3, "expected 2 cells as in the header, got 3"),
        ("r.csv", b"instruction,output\na,b\nc,\n", 3, "is empty"),
        ("r.csv", b"instruction,output\n\xc3\xa9\xc3\xa9,b\n\xff,d\n", 3, "UTF-8"),
        ("r.csv", b'instruction,output\na,b\n"c"x,d\n', 3, "not valid CSV"),
    ],
)  # fmt: skip
def test_a_bad_row_stops_with_file_and_line_or_is_counted(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as stopped:
        load_tasks(config_of(str(path)))
    assert str(stopped.value).startswith(f"{path}:{line}: ")
    assert message in str(stopped.value)
    assert "prompt.bad_rows=skip" in str(stopped.value)
    task = load_tasks(config_of(str(path), prompt={"bad_rows": "skip"}))[0]
    assert [row["output"] for row in task.train] == ["b"]
    assert (task.counts["train"].read, task.counts["train"].skipped, task.counts["train"].kept) == (2, 1, 1)
    assert f":{line}: " in task.counts["train"].problems[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"", "empty file"),
        ("r.csv", b"a,b,a\n1,2,3\n", "has duplicate columns: a"),
        ("r.parquet", b"PAR1 but not really", "not readable as Parquet"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_bad_utf8_in_parquet_names_the_row(tmp_path):
    text = pyarrow.array([b"good", b"\xff"], type=pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = pyarrow.table({"instruction": text, "output": ["b", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet:2: not UTF-8"):
        load_tasks(config_of(str(tmp_path / "r.parquet")))


def test_split_and_subset_of_a_plain_file_are_refused(rows_file):
    with pytest.raises(DataError, match="apply to saved and hub datasets"):
        read(rows_file(questions(2)), split="train")


def test_an_unreadable_file_is_a_data_error(tmp_path):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(DataError, match=r"rows\.json"):
        read(tmp_path / "rows.json", format="json")
