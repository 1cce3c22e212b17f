"""Files of lines are split at line feeds alone, wherever the package, a benchmark or a script reads one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from braidlora.errors import CheckpointError
from braidlora.evaluation.predictions import PredictionFile
from braidlora.reporting.loss_plots import read_losses
from braidlora.runs import Committed, read_jsonl, read_lines, split_lines
from braidlora.training.run_log import RunLog

ROOT = Path(__file__).parent.parent
ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines splits as well


def test_only_a_line_feed_ends_a_line(tmp_path):
    lines = [f"a{end}b" for end in ENDS] + ["", "c"]
    path = tmp_path / "lines"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    assert read_lines(path) == lines
    assert split_lines("a\r\nb") == ["a", "b"]
    assert split_lines("") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl:2: not readable as JSON"):
        read_jsonl(path)
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl:2: not UTF-8"):
        read_jsonl(path)
    with pytest.raises(CheckpointError, match=r"none: missing\. Is this the right directory"):
        read_jsonl(tmp_path / "none")


def test_what_a_run_writes_is_read_back_whole(tmp_path):
    record = {
        "index": 0,
        "prompt": ENDS,
        "reference": ENDS,
        "prediction": ENDS,
        "extracted": ENDS,
        "score": 1.0,
    }
    file = PredictionFile(tmp_path, "t", {"data": "x"}, 1)
    file.append(record)
    file.finish()
    assert read_jsonl(file.path) == [record]
    assert PredictionFile(tmp_path, "t", {"data": "x"}, 1).missing == []
    task = f"task{ENDS}"
    logs = {"loss": 1.0, f"loss/{task}": 1.0, "epoch": 1.0, "learning_rate": 0.1, "grad_norm": 1.0}
    log = RunLog(tmp_path / "log.jsonl")
    log.start(None)
    log.add(1, logs)
    again = RunLog(tmp_path / "again.jsonl")
    again.start(Committed(tmp_path, needs_manifest=False))  # as from a checkpoint
    assert json.loads(again.text())["tasks"] == {task: 1.0}
    assert read_losses(tmp_path / "log.jsonl") == {task: [(1, 1.0)]}


def test_nothing_in_the_package_splits_at_other_characters():
    found = []
    for folder in ("src", "benchmarks", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
                if (
                    re.search(r"\.(splitlines|readlines)\(", line)
                    and "__doc__" not in line
                    and "/proc/" not in line
                ):
                    found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == [], "use runs.read_lines, runs.read_jsonl or split at \\n"
