"""The script of the page on rules registers a rule of its own and runs a federation with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.pages import steps

ROOT = Path(__file__).parents[2]
FEWER = {
    "federation.rounds": 2, "federation.local.epochs": None, "federation.local.steps": 1,
    "tasks.*.train.limit": 16, "tasks.*.test.limit": 3,
}  # fmt: skip


@pytest.mark.timeout(900)
def test_the_script_of_the_page_runs_a_federation_under_a_new_rule(tmp_path):
    (script,) = [
        step for step in steps(ROOT / "docs" / "howto" / "add-a-rule.md") if step.name == "share_b.py"
    ]
    text = script.text.replace('output="runs/share-b"', f'output="runs/share-b", **{FEWER}')
    assert text != script.text
    (tmp_path / script.name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout.strip().splitlines()[-1]) <= 100
    assert (tmp_path / "runs" / "share-b" / "metrics.json").is_file()
