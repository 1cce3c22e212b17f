"""The report of one training run: what to know first, confusion matrices of label tasks, wrong answers."""

import json

import pytest
from comparisons import environment
from document import Document

from braidlora.reporting.confusion import OTHER, confusion, confusion_plot
from braidlora.reporting.page import write_report
from braidlora.reporting.run_sections import run_advice, run_findings

LABELS = ["billing", "shipping", "refund"]


def record(index, right, answer, score=None):
    score = 100.0 * (right == answer) if score is None else score
    return {
        "index": index, "prompt": f"row {index} <b>", "reference": right, "prediction": answer, "extracted": answer,
        "score": score,
    }  # fmt: skip


@pytest.fixture
def run():
    answers = [("billing", "billing")] * 6 + [("shipping", "billing")] * 3 + [("refund", "refund")] * 5
    answers += [("refund", "no idea")]
    tickets = [record(index, *pair) for index, pair in enumerate(answers)]
    say = [record(index, f"text {index}", f"text {index % 2}") for index in range(4)]
    return {
        "name": "tickets",
        "command": "braidlora train tickets.yaml --resume auto",
        "settings": {"learning_rate": 1e-3, "epochs": 3.0, "max_steps": None},
        "recipe": "tasks: []\n",
        "environment": environment(),
        "metrics": {
            "tasks": {
                "tickets": {"metric": "accuracy", "score": 73.3, "n": 15},
                "say": {"metric": "exact_match", "score": 50.0, "n": 4},
            },
            "mean": 61.7, "worst": 50.0, "worst_task": "say", "std": 1.0, "seconds": 12.0,
            "majority": {"tickets": 10.0, "say": 0.0}, "trainable_parameters": 1234,
        },
        "data": {
            "tickets": {
                "train": {"rows": 90, "encoded": {"rows": 90, "dropped": 0, "truncated": 45}},
                "test": {"rows": 15, "in_train": 0, "unseen_labels": {"refund": 6}},
            },
            "say": {"train": {"rows": 9}, "test": {"rows": 4}},
        },
        "labels": {"tickets": LABELS, "say": None},
        "predictions": {"tickets": tickets, "say": say},
    }  # fmt: skip


def test_answers_are_counted_by_right_label(run):
    found = confusion(run["predictions"]["tickets"], LABELS)
    assert found.columns == [*LABELS, OTHER]
    assert found.counts == {
        ("billing", "billing"): 6, ("shipping", "billing"): 3, ("refund", "refund"): 5, ("refund", OTHER): 1,
    }  # fmt: skip
    assert [found.recall(label) for label in LABELS] == [100.0, 0.0, pytest.approx(100 * 5 / 6)]
    assert [found.precision(label) for label in LABELS] == [pytest.approx(100 * 6 / 9), None, 100.0]
    assert found.worst() == [("shipping", "billing", 3), ("refund", OTHER, 1)]
    plot = confusion_plot("my task", found)
    assert plot.name == "confusion-my-task"
    assert "Most often wrong: shipping as billing (3 times)" in plot.caption


def test_case_and_spaces_of_an_answer_do_not_matter():
    found = confusion([record(0, "Yes", " yes "), record(1, "No", "No")], ["Yes", "No"])
    assert found.counts == {("Yes", "Yes"): 1, ("No", "No"): 1}


@pytest.mark.parametrize(
    ("records", "labels"),
    [
        ([record(0, "a", "a")], None),
        ([], ["a", "b"]),
        ([record(0, ["a", "b"], "a", 100.0)], ["a", "b"]),
        ([record(n, f"l{n}", "x") for n in range(40)], [f"l{n}" for n in range(40)]),
    ],
    ids=["free text", "no rows", "several right answers", "too many labels"],
)
def test_what_has_no_matrix(records, labels):
    assert confusion(records, labels) is None


def test_the_page_shows_matrix_and_wrong_answers(run, tmp_path):
    losses = [
        {"step": step, "epoch": 1.0, "loss": 1 / step, "tasks": {"tickets": 1 / step}} for step in (1, 2, 3)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    page = Document(write_report(tmp_path, None, run=run))
    assert {"scores", "labels", "wrong", "training", "origin"} <= set(page.ids())
    assert {"confusion-tickets-title", "training-loss-title"} <= set(page.ids())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "tickets: 4 wrong or partly wrong answers of 15" in text
    assert "say: 2 wrong or partly wrong answers of 4" in text
    assert "row 6 &lt;b&gt;" in text
    assert (tmp_path / "figures" / "confusion-tickets.png").is_file()


def test_advice_and_findings(run):
    what, sure, then = run_advice(run)
    assert what == "Mean score 61.7 over 2 tasks, lowest on say (50.0)."
    assert sure.startswith("Confidence: one run with one seed, 19 test rows;")
    assert "braidlora compare" in then
    found = "\n".join(run_findings(run))
    assert "tickets: 6 test rows of 15 have a label that no training row has ('refund')" in found
    assert "prompt.cutoff: 50% of tickets truncated" in found
    assert "Not learned" not in found
    run["metrics"]["majority"] = {"tickets": 80.0, "say": 0.0}
    assert (
        any(one.startswith("Not learned: tickets;") for one in run_findings(run))
        or "Nothing was learned" in (run_advice(run)[0])
    )
    run["metrics"]["majority"] = {"tickets": 60.0, "say": 45.0}
    what, _, then = run_advice(run)
    assert what == (
        "Too few test rows (19) to say whether anything was learned: the mean score is 61.7, and always giving the "
        "most frequent answer scores 52.5."
    )
    assert then.startswith("Next: Add test rows. Train longer")
    run["metrics"]["majority"] = {"tickets": 80.0, "say": 60.0}
    what, _, then = run_advice(run)
    assert what.startswith("Nothing was learned: the mean score, 61.7, does not beat")
    assert then == (
        "Next: Train longer (--training.epochs=6, now 3) or raise the learning rate (--training.learning_rate=0.003, "
        "now 0.001)."
    )


def test_a_run_without_test_rows(run):
    run["metrics"]["tasks"] = {}
    assert run_advice(run)[0] == "Nothing was scored: no task has test rows."
