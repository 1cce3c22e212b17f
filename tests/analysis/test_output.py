"""What an analysis may replace, and what it must leave alone."""

import json

import pytest

from braidlora.analysis.output import AnalysisDirectory, rounded
from braidlora.errors import ConfigError

ANALYSIS = {"adapters": [], "similarity": None, "drift": {}}


def test_an_older_analysis_is_replaced_with_its_figures(tmp_path):
    folder = tmp_path / "seen"
    AnalysisDirectory(folder).write(ANALYSIS, "braidlora analyze one")
    written = json.loads((folder / "analysis.json").read_text())
    assert written["braidlora"]
    assert written["command"] == "braidlora analyze one"
    assert written["environment"]["versions"]["numpy"]
    (folder / "analysis.json").write_text(json.dumps({**written, "figures": [{"name": "old"}]}))
    for name in ("old.png", "old.svg"):
        (folder / name).write_text("x")
    AnalysisDirectory(folder).write(ANALYSIS, "braidlora analyze one")
    assert [path.name for path in folder.iterdir()] == ["analysis.json"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"thesis.tex": "x"}, "holds thesis.tex"),
        ({"analysis.json": json.dumps({"figures": []}), "drift.png": "x"}, "holds drift.png"),
        ({"analysis.json": '{"mine": 1}'}, "was not written by braidlora"),
        ({"analysis.json": "{"}, "was not written by braidlora"),
        ({"analysis.json": json.dumps({"figures": [{"name": "../x"}]}), "x.txt": "x"}, "holds x.txt"),
    ],
)
def test_files_of_somebody_else_are_not_touched(files, says, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        AnalysisDirectory(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_the_path_is_checked_as_a_runs_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"contains `\.\.`"):
        AnalysisDirectory("../elsewhere")


def test_runs_may_stand_beside_a_study_alone(tmp_path):
    (tmp_path / "runs").mkdir()
    AnalysisDirectory(tmp_path, allowed=("runs",))
    with pytest.raises(ConfigError, match="holds runs"):
        AnalysisDirectory(tmp_path)


def test_six_digits():
    value = {"a": [0.123456789, None, 1, True, "x"], "b": 1.23456789e-12}
    assert rounded(value) == {"a": [0.123457, None, 1, True, "x"], "b": 1.23457e-12}
