"""Every command of docs/reference/inference.md runs, and so does the Python of both pages."""

import re
import shlex
import textwrap
import warnings
from pathlib import Path

import pytest

from braidlora.cli import main

DOCS = Path(__file__).parents[2] / "docs" / "reference"
RECIPE = """
tasks:
- {name: sum, train: {source: "generated:sum", limit: 12}, test: {source: "generated:sum", limit: 3}}
- {name: mood, train: {source: "generated:mood", limit: 12}, test: {source: "generated:mood", limit: 3}}
adapter: {r: 2, target_modules: [q_proj]}
prompt: {template: "{instruction} =", cutoff: 48}
"""
SHORT = "training: {max_steps: 2, warmup_steps: 0, threads: 1}\n"


def commands():
    return re.findall(
        r"^    (braidlora .*)$", (DOCS / "inference.md").read_text(encoding="utf-8"), flags=re.M
    )


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, flags=re.S)]


@pytest.fixture
def place(tmp_path, classifier, writer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "support").symlink_to(classifier)
    (tmp_path / "runs" / "writer").symlink_to(writer)
    (tmp_path / "rows.csv").write_text("text\nabc\nde\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "prompts.txt").write_text("rising 3 1 2\n")
    (tmp_path / "my.yaml").write_text(RECIPE + SHORT)
    (tmp_path / "fed.yaml").write_text(
        RECIPE + "federation: {rule: fed-alora, rounds: 1, local: {steps: 1}}\n"
    )
    return tmp_path


def test_every_command_of_the_page_runs(place, capsys):
    assert len(commands()) > 8
    for command in commands():
        assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
        assert capsys.readouterr().out.strip() or "--output" in command


def test_the_python_of_the_pages_runs(place, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (snippet,) = blocks("inference.md")
        found: dict = {}
        exec(snippet, found)
        assert found["model"].config.id2label == dict(enumerate(found["card"]["labels"]))
        found = {}
        for block in blocks("python.md"):
            exec(block, found)
    assert found["comparison"]["failed"] == []
    assert found["similarity"]
