"""Rows are picked while the source streams by: the same rows as ever, in little memory, and no bomb goes off."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from task_helpers import config_of, questions

from braidlora.config import DataSource, RunConfig
from braidlora.errors import DataError
from braidlora.tasks import load_tasks, read
from braidlora.tasks.read import read_rows


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_limit_draws_the_first_of_one_shuffled_order_of_the_rows_that_can_be_kept(tmp_path):
    rows = [
        {"instruction": f"q{i}", "output": "" if i % 7 == 3 else f"a{i}", "of": i % 2} for i in range(100)
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    usable = [row["output"] for row in rows if row["output"] and row["of"] == 1]
    for limit in (1, 5, len(usable) - 1, len(usable), 1000):
        source = {"source": path, "limit": limit, "where": {"of": 1}}
        task = {"name": "t", "train": source, "test": source}
        config = {"tasks": [task], "seed": 5, "split": {"seed": 3}, "prompt": {"bad_rows": "skip"}}
        [loaded] = load_tasks(RunConfig.model_validate(config))
        for part, seed in (("train", "5/t/train"), ("test", "3/t/test")):
            order = list(range(len(usable)))
            if limit < len(usable):
                random.Random(seed).shuffle(order)
            assert [row["output"] for row in loaded.rows(part)] == [
                usable[at] for at in sorted(order[:limit])
            ]
            counts = loaded.counts[part]
            assert (counts.read, counts.filtered, counts.kept) == (100, 50, min(limit, len(usable)))
            assert counts.read == counts.filtered + counts.skipped + counts.not_drawn + counts.kept


def test_a_file_with_the_rows_of_many_tasks_is_read_once_or_twice(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", [{**row, "task": i % 4} for i, row in enumerate(questions(40))])
    reads = []

    def counted(source, part):
        reads.append(part)
        return read_rows(source, part)

    monkeypatch.setattr("braidlora.tasks.load.read_rows", counted)
    tasks = [{"name": f"t{i}", "train": {"source": path, "where": {"task": i}}} for i in range(4)]
    assert [len(task.train) for task in load_tasks(RunConfig.model_validate({"tasks": tasks}))] == [10] * 4
    assert len(reads) == 1
    for task in tasks:
        task["train"]["limit"] = 3
    assert [len(task.train) for task in load_tasks(RunConfig.model_validate({"tasks": tasks}))] == [3] * 4
    assert len(reads) == 3


def test_labels_of_rows_that_are_not_drawn_are_known(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"x{i}", "label": f"l{i}"} for i in range(9)])
    [task] = load_tasks(config_of(path, task={"kind": "classify", "train": {"source": path, "limit": 2}}))
    assert task.labels == [f"l{i}" for i in range(9)]


PEAK = """
import resource, sys
from braidlora.config import RunConfig
from braidlora.tasks.load import load_tasks
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[task] = load_tasks(RunConfig.model_validate({"tasks": [{"name": "t", "train": {"source": sys.argv[1], "limit": 5}}]}))
assert len(task.train) == 5
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_limited_task_takes_the_memory_of_its_rows_not_of_the_file(tmp_path, kind):
    path, text = tmp_path / f"rows.{kind}", "word " * 2000
    with open(path, "w") as file:
        file.write({"jsonl": "", "json": "[", "csv": "instruction,output\n"}[kind])
        for i in range(5000):  # 50 MB
            row = json.dumps({"instruction": f"{i} {text}", "output": "x"})
            file.write(
                {"jsonl": row + "\n", "json": ("," if i else "") + row, "csv": f"{i} {text},x\n"}[kind]
            )
        file.write({"jsonl": "", "json": "]", "csv": ""}[kind])
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    assert int(child.stdout) < 40, "MiB"


@pytest.mark.parametrize(("limit", "dictionary"), [("null", True), ("5", False)])
def test_a_parquet_file_that_expands_is_refused_before_it_fills_the_memory(tmp_path, limit, dictionary):
    path = tmp_path / "bomb.parquet"
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 1_000_000, type=pyarrow.int32()), pyarrow.array(["x" * 20_000])
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": texts, "output": texts}),
        path,
        compression="zstd",
        store_schema=dictionary,
    )
    assert path.stat().st_size < 20_000
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"tasks: [{{name: a, train: {{source: {path}, limit: {limit}}}}}]\n")
    command = [sys.executable, "-m", "braidlora", "preview", str(recipe)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 3
    assert "bytes expand to" in child.stderr
    assert "the limit for a file of this size is" in child.stderr
    assert "Traceback" not in child.stderr


def test_an_ordinary_parquet_file_with_repeated_values_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"instruction": ["q" * 100] * 50_000, "output": ["a"] * 50_000}), path
    )
    [task] = load_tasks(RunConfig.model_validate({"tasks": [{"name": "t", "train": str(path)}]}))
    assert len(task.train) == 50_000


@pytest.mark.parametrize("error", [MemoryError(), pyarrow.ArrowMemoryError("malloc of size 1 failed")])
def test_when_memory_runs_out_the_source_and_a_remedy_are_named(tmp_path, monkeypatch, error):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["q"], "output": ["a"]}), path)
    config = RunConfig.model_validate({"tasks": [{"name": "t", "train": str(path)}]})

    def fails(*_):
        raise error

    for where in ("braidlora.tasks.select.to_row", "braidlora.tasks.read._check_expanded"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fails)
            with pytest.raises(
                DataError, match=r"rows\.parquet: .*memory ran out.*`limit` or `where`|Free memory"
            ):
                load_tasks(config)


def test_json_is_read_across_the_borders_of_blocks(tmp_path, monkeypatch):
    values = [{"a": "é\u2028🙂" * 5, "b": [1.5, -20, None, True, {"c": '"}],['}], "n": i} for i in range(60)]
    path = tmp_path / "rows.json"
    for indent in (None, 1):
        path.write_text("\ufeff" + json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
        for block in (1, 2, 3, 7, 64, 1000):
            monkeypatch.setattr("braidlora.tasks._json_list._BLOCK", block)
            found = list(read._json(path, DataSource(source=str(path))))
            assert [row.columns for row in found] == values
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(lines[int(row.place.rpartition(":")[2]) - 1].strip() == "{" for row in found)
