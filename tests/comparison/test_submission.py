"""`compare --submit FILE`: a table as one file, which scripts/check_cell.py can check on another machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from braidlora.cli import main
from braidlora.comparison.submission import submission
from braidlora.errors import TrainingError

ROOT = Path(__file__).parents[2]
TWO_TASKS = '--tasks=[{name: mood, train: "generated:mood"}, {name: sum, train: "generated:sum"}]'
WORDS = ["compare", "demo", TWO_TASKS, "--methods=lora,alora", "--no-single-task", "--no-report", "--workers=1",
         "--tasks.*.train.limit=20", "--training.max_steps=3", "--training.warmup_steps=1",
         "--training.threads=1"]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    """A folder with `table.json`, and the comparison that it is from."""
    folder = tmp_path_factory.mktemp("submitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--seeds=0,1,2", "--output=cmp", "--submit=out/table.json"]) == 0
    return folder


def test_the_file_has_the_numbers_and_no_folder_of_this_machine(submitted):
    table = json.loads((submitted / "out" / "table.json").read_text())
    whole = json.loads((submitted / "cmp" / "comparison.json").read_text())
    assert table["kind"] == "submission"
    assert [row["mean"] for row in table["rows"]] == [row["mean"] for row in whole["rows"]]
    assert table["rows"][1]["difference"] == whole["rows"][1]["difference"]
    assert table["data"]["sum"]["test"] == {
        key: whole["data"]["sum"]["test"][key] for key in ("rows", "sha256")
    }
    assert table["recipe"] == whole["recipe"]
    assert not any("runs" in part for part in (table["references"], *table["rows"]))
    assert str(submitted) not in json.dumps(table)


def check(*words):
    command = [sys.executable, ROOT / "scripts" / "check_cell.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_cell_of_it_is_the_same_again_on_the_same_rows(submitted):
    ran = check(submitted / "out" / "table.json", "--row", "alora")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["same"], found["same_data"], found["other_data"]) == (True, True, [])


def test_other_rows_are_noticed(submitted, tmp_path):
    table = json.loads((submitted / "out" / "table.json").read_text())
    table["data"]["sum"]["test"]["sha256"] = "0" * 64
    (tmp_path / "table.json").write_text(json.dumps(table))
    ran = check(tmp_path / "table.json", "--row", "alora")
    found = json.loads(ran.stdout)
    assert ran.returncode == 1
    assert (found["within"], found["same_data"], found["other_data"]) == (True, False, ["sum"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0,1", "--submit=t.json"], "--submit: got 2 seeds; expected at least 3"),
        (["--submit=folder"], "folder is a folder; give a file name"),
        (["--submit=notes.json"], "exists and is not a submission; it was not changed"),
    ],
)
def test_what_cannot_be_submitted_is_said_before_training(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.json").write_text('{"kind": "mine"}')
    assert main([*WORDS, *words, "--output=cmp"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cmp").exists()
    assert (tmp_path / "notes.json").read_text() == '{"kind": "mine"}'


def test_a_table_with_failed_runs_is_not_submitted(submitted):
    whole = json.loads((submitted / "cmp" / "comparison.json").read_text())
    with pytest.raises(
        TrainingError, match=r"--submit: these runs failed, so nothing was written: alora-seed1\."
    ):
        submission({**whole, "failed": [{"run": "alora-seed1", "reason": "x"}]})
