"""`mode` per task through the command line: preview, train, evaluate, compare, federate, and predict by a copy."""

import copy
import json
import shutil

import pytest
import yaml

from braidlora.cli import main

RECIPE = {
    "model": {"path": "embedded"},
    "adapter": {"r": 2, "num_experts": 2, "target_modules": ["q_proj"]},
    "tasks": [
        {"name": "sum", "train": {"source": "generated:sum", "limit": 20}, "test": {"limit": 4}},
        {
            "name": "mood", "train": {"source": "generated:mood", "limit": 20}, "test": {"limit": 6}, "mode": "rank",
            "metric": "macro_f1",
        },
    ],
    "prompt": {"template": "{instruction} =", "cutoff": 64},
    "training": {"max_steps": 2, "batch_size": 8, "warmup_steps": 0, "threads": 1},
    "evaluation": {"batch_size": 20, "max_new_tokens": 3},
}  # fmt: skip
RECIPE["tasks"][1]["options"] = ["positive", "negative"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return str(path)


def run(capsys, *words):
    code = main(list(words))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_ranks_one_task_and_writes_the_other_and_its_adapter_does_the_same(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    metrics = json.loads(run(capsys, "train", recipe, "--json", f"--output={output}"))["tasks"]
    assert (metrics["sum"]["n"], metrics["mood"]["n"]) == (4, 6)
    assert metrics["mood"]["metric"] == "macro_f1"
    assert metrics["mood"]["score"] == pytest.approx(metrics["mood"]["macro_f1"])
    answers = {row["prediction"] for row in lines(output / "predictions" / "mood.jsonl")}
    assert answers <= {"positive", "negative"}
    card = json.loads((output / "adapter" / "braidlora.json").read_text())
    assert [task["mode"] for task in card["tasks"]] == [None, "rank"]

    copied = tmp_path / "elsewhere"
    shutil.copytree(output / "adapter", copied)
    text = ["--text", "is this review positive or negative : the soup was not bad"]
    [ranked] = [
        json.loads(line) for line in run(capsys, "predict", str(copied), "--task", "mood", *text).splitlines()
    ]
    assert set(ranked["probabilities"]) == {"positive", "negative"}
    [written] = [
        json.loads(line)
        for line in run(
            capsys, "predict", str(copied), "--task", "mood", "--mode", "generate", *text
        ).splitlines()
    ]
    assert "probabilities" not in written
    [number] = [
        json.loads(line)
        for line in run(
            capsys, "predict", str(copied), "--task", "sum", "--text", "what is 1 and 2"
        ).splitlines()
    ]
    assert "probabilities" not in number

    again = run(capsys, "evaluate", str(output), "--json", "--tasks.mood.mode=generate")
    assert json.loads(again)["tasks"]["mood"]["n"] == 6
    assert (
        json.loads((output / "metrics.json").read_text())["tasks"] == metrics
    )  # it went to a folder of its own


def test_preview_shows_the_mode_and_the_metric(recipe, capsys):
    shown = json.loads(run(capsys, "preview", recipe, "--json"))["tasks"]
    assert {name: (task["mode"], task["metric"]) for name, task in shown.items()} == {
        "sum": ("generate", "exact_match"), "mood": ("rank", "macro_f1"),
    }  # fmt: skip
    assert "answered by ranking positive, negative" in run(capsys, "preview", recipe)


def test_a_federation_scores_its_clients_by_their_tasks_modes(tmp_path, capsys):
    output = tmp_path / "federation"
    content = {**copy.deepcopy(RECIPE), "federation": {"local": {"steps": 1}}}
    content["adapter"].pop("num_experts")
    content["training"].pop("max_steps")
    path = tmp_path / "federated.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    run(capsys, "federate", str(path), "--json", "--federation.rounds=1", f"--output={output}")
    answers = {row["prediction"] for row in lines(output / "clients" / "mood" / "predictions" / "mood.jsonl")}
    assert answers <= {"positive", "negative"}


def test_a_comparison_has_intervals_of_macro_f1(recipe, tmp_path, capsys):
    output = tmp_path / "compared"
    words = ["--methods", "lora,alora", "--seeds", "0", "--no-single-task", "--no-report", "--workers", "1"]
    run(capsys, "compare", recipe, *words, f"--output={output}")
    result = json.loads((output / "comparison.json").read_text())
    assert result["tasks"]["mood"]["metric"] == "macro_f1"
    rows = {row["name"]: row for row in result["rows"]}
    difference = rows["alora"]["tasks"]["mood"]["mean"] - rows["lora"]["tasks"]["mood"]["mean"]
    assert rows["alora"]["difference"]["tasks"]["mood"]["mean"] == pytest.approx(difference, abs=1e-9)


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")  # max_new_tokens has no effect with rank
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--tasks.sum.mode=rank"], r"tasks.sum.mode: `rank` chooses among a task's options, but sum has none."),
        (["--evaluation.mode=rank"], r"evaluation.mode: `rank` chooses among a task's options, but sum has none."),
        (["--tasks.mood.options=null", "--tasks.mood.train.source=generated:sum"], "macro_f1 needs a set of labels"),
        (["--tasks.mood.metric=f1"], "positive: missing; `f1` is the F1 of one label"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_before_training(recipe, tmp_path, capsys, overrides, message):
    assert main(["train", recipe, f"--output={tmp_path / 'run'}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")
def test_rank_without_options_proposes_those_of_the_training_rows(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    content = [{"instruction": f"q{n}", "output": ["yes", "no"][n % 2]} for n in range(8)]
    rows.write_text("\n".join(map(json.dumps, content)))
    path = tmp_path / "recipe.yaml"
    task = {"name": "t", "train": str(rows), "mode": "rank"}
    path.write_text(yaml.safe_dump({**RECIPE, "tasks": [task], "split": {"test": 0.3}}), encoding="utf-8")
    assert main(["train", str(path), f"--output={tmp_path / 'run'}"]) == 2
    assert 'Give it `options: ["yes", "no"]`, or generate answers' in capsys.readouterr().err
