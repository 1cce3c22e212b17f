"""`braidlora advise` as its users call it."""

import json

import pytest

import braidlora
from braidlora.cli import main

# 1,440 rows of a run: 4 steps of 26 rows a task.
SMALL = ["--tasks.*.train.limit=60", "--tasks.*.test.limit=4", "--training.threads=1"]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")  # sixty rows of many animals
def test_the_demo_is_probed_and_its_measurements_are_printed(inside, capsys):
    assert main(["advise", "demo", *SMALL]) == 0
    printed, progress = capsys.readouterr()
    assert progress.index("Cost: ") < progress.index("[1/8] rising") < progress.index("[8/8] sum")
    assert printed.lstrip().startswith("The probe cost ")
    for line in ("cosine of gradients on A", "cosine of ΔW", "similarity of B", "likeness of A x", "Next: "):
        assert line in printed
    result = json.loads((inside / "runs" / "demo-advise" / "advice.json").read_text())
    cost = result["cost"]
    assert cost["rows"] == round(8 * (cost["steps"] * cost["batch_size"] + cost["gradient_rows"] * 4 / 3))
    assert cost["share_of_rows"] == pytest.approx(cost["rows"] / cost["comparison"]["rows"], rel=1e-5)
    assert cost["share_of_rows"] <= 0.05
    assert cost["seconds"] > 0
    assert len(result["pairs"]) == 28
    assert result["command"].startswith("braidlora advise demo")
    assert all(-1 <= value <= 1 for key, value in result["measures"].items() if "relative" not in key)
    # Sorting up and sorting down, with prompts that differ in one word.
    assert ["rising", "falling"] in [pair["tasks"] for pair in result["pairs"][:5]]


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")
def test_json_is_what_is_written_and_an_older_result_is_replaced(inside, capsys):
    two = ['--tasks=[{name: rising, train: "generated:rising"}, {name: sum, train: "generated:sum"}]', *SMALL]
    words = ["advise", "demo", *two, "--budget=0.1", "--output=advice", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert json.loads((inside / "advice" / "advice.json").read_text()) == first
    assert main(words) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["pairs"] == first["pairs"]
    assert second["gradients"] == first["gradients"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--budget=0"], 2, "--budget: got 0"),
        (["--tasks.*.train.limit=10"], 2, "--budget 0.05: the smallest probe (8 tasks × 4 steps) costs"),
        (
            ['--tasks=[{name: sum, train: "generated:sum"}]'],
            2,
            "with fewer than two there is nothing to share",
        ),
        (["--adapter.method={peft_type: LOHA}"], 2, "another PEFT configuration"),
        (["--adapter.target_parameters=[mlp.experts.up_proj]"], 2, "not stacked experts"),
        (["--output=full"], 2, "holds notes.txt, which are not from `advise`"),
    ],
)
def test_what_cannot_be_probed_is_said(words, code, message, inside, capsys):
    (inside / "full").mkdir()
    (inside / "full" / "notes.txt").write_text("mine")
    assert main(["advise", "demo", *words]) == code
    assert message in capsys.readouterr().err
    assert (inside / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")
def test_the_python_call(make_config, tmp_path):
    found = braidlora.advise(make_config(), share=1.0, progress=False, output=str(tmp_path / "advice"))
    assert found["tasks"] == ["up", "rev", "len"]
    assert found["advice"]["next"]
    assert (tmp_path / "advice" / "advice.json").is_file()
