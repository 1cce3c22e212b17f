"""scripts/check_cell.py: reruns one cell of a published table and compares it with the table's interval."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCORES = {"mean": 50.0, "std_seeds": 2.0, "values": [48.0, 50.0, 52.0]}


@pytest.fixture
def check_cell(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_cell

    return check_cell


@pytest.mark.parametrize(
    ("score", "within"), [(50.0, True), (59.9, True), (60.0, False), (40.1, True), (40.0, False)]
)
def test_one_more_seed_lies_within_the_prediction_interval(check_cell, score, within):
    # t(97.5%, 2) = 4.3027; 4.3027 · 2 · √(4/3) = 9.936
    found = check_cell.compare(score, check_cell.Published(None, SCORES, 1), 0.95)
    assert found["interval"] == pytest.approx([40.0635, 59.9365], abs=1e-3)
    assert found["within"] is within
    assert found["same"] is (score == 50.0)


def test_one_seed_has_only_its_own_value(check_cell):
    one = {"mean": 50.0, "std_seeds": None, "values": [50.0]}
    assert check_cell.compare(50.0, check_cell.Published(None, one, 0), 0.95)["within"]
    assert not check_cell.compare(50.5, check_cell.Published(None, one, 0), 0.95)["within"]


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "check_cell.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")  # twenty rows of many animals
def test_a_cell_of_a_comparison_is_the_same_again(check_cell, tmp_path):
    from braidlora import compare

    small = {
        "tasks.*.train.limit": 20,
        "training.max_steps": 4,
        "training.warmup_steps": 1,
        "training.threads": 1,
    }
    published = compare(
        "demo", methods=["alora"], seeds=(0, 1), references="none", workers=1, report=False,
        progress=False, output=str(tmp_path / "cmp"), **small,
    )  # fmt: skip
    file = tmp_path / "cmp" / "comparison.json"
    ran = run(file, "--row", "alora", "--seed", 1, "--output", tmp_path / "again")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["same"]
    assert found["score"] == published["rows"][0]["mean"]["values"][1]
    assert (tmp_path / "again" / "metrics.json").is_file()


def published_federation(tmp_path, monkeypatch):
    """A table of one federation, and the command line that checks it."""
    row = {"options": [], "mean": SCORES, "seconds": {"mean": 2.0}}
    result = {
        "kind": "federations", "recipe": "fed_demo", "options": [], "seeds": [0, 1, 2],
        "groups": {"": {"options": [], "rows": {"fedit": row}}},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["check_cell.py", str(tmp_path / "result.json")])


def test_a_score_outside_the_interval_is_exit_code_1(check_cell, monkeypatch, capsys, tmp_path):
    published_federation(tmp_path, monkeypatch)
    for score, code in ((50.0, 0), (61.0, 1)):
        monkeypatch.setattr(check_cell, "rerun", lambda cell, output, score=score: (score, None))
        assert check_cell.main() == code
        assert json.loads(capsys.readouterr().out)["score"] == score


@pytest.mark.parametrize(("other", "code"), [([], 0), (["sum"], 1), (None, 0)])
def test_a_score_on_other_rows_is_not_a_check(check_cell, other, code, monkeypatch, capsys, tmp_path):
    published_federation(tmp_path, monkeypatch)
    monkeypatch.setattr(check_cell, "rerun", lambda cell, output: (50.0, other))
    assert check_cell.main() == code
    found = json.loads(capsys.readouterr().out)
    assert found["same_data"] is (None if other is None else not other)
    assert found["other_data"] == (other or [])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--row", "none"], "the rows are fedit, fed-alora"), (["--seed", 9], "the seeds are 0, 1")],
)
def test_a_cell_that_is_not_there(tmp_path, words, message):
    row = {"options": [], "mean": SCORES, "seconds": {"mean": 2.0}}
    result = {
        "kind": "federations", "recipe": "fed_demo", "options": [], "seeds": [0, 1],
        "groups": {"": {"options": [], "rows": {"fedit": row, "fed-alora": row}}},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    ran = run(tmp_path / "result.json", *words)
    assert ran.returncode == 2
    assert message in ran.stderr


def test_a_federation_is_taken_with_all_its_options(check_cell):
    row = {"options": ["--federation.rule=fedit"], "mean": SCORES, "seconds": {"mean": 2.0}}
    result = {
        "kind": "federations", "recipe": "fed_demo", "options": ["--federation.rounds=2"], "seeds": [0, 3, 4],
        "groups": {"mixed": {"options": ["--training.batch_size=5"], "rows": {"fedit": row}}},
    }  # fmt: skip
    cell = check_cell.find(result, None, 3, ["--training.learning_rate=0.5"])
    assert cell.config.federation.rule == "fedit"
    assert (cell.config.federation.rounds, cell.config.seed, cell.at) == (2, 3, 1)
    assert (cell.config.training.batch_size, cell.config.training.learning_rate) == (5, 0.5)
