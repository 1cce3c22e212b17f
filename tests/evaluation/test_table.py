"""The table, read as a person would: columns by position."""

from braidlora.evaluation.table import format_metrics

METRICS = {
    "tasks": {
        "boolq": {"metric": "accuracy", "score": 61.25, "n": 3270, "unparsed": 12},
        "web_nlg_en": {"metric": "rouge1", "score": 7.0, "n": 200},
    },
    "mean": 34.125,
    "worst": 7.0,
    "worst_task": "web_nlg_en",
    "std": 27.125,
    "delta_m": -6.394,
}


def test_metrics_stand_beside_base_and_majority():
    text = format_metrics(METRICS, {"base": {"boolq": 50.0, "web_nlg_en": 1.0}, "majority": {"boolq": 62.2}})
    lines = text.split("\n")
    assert lines[0].split() == ["task", "metric", "n", "score", "base", "majority", "unparsed"]
    assert lines[2].split() == ["boolq", "accuracy", "3270", "61.2", "50.0", "62.2", "12"]
    assert lines[3].split() == ["web_nlg_en", "rouge1", "200", "7.0", "1.0", "–", "0"]
    assert set(lines[4]) == {"-"}
    assert lines[5].split() == ["mean", "3470", "34.1", "25.5", "–", "12"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "worst task web_nlg_en (7.0), spread over tasks (std) 27.1" in text
    assert "Δm% -6.39 relative to single-task LoRA (lower is better)" in text


def test_without_references_the_reason_stands_below():
    without = {**METRICS, "delta_m": None, "delta_m_reason": "no single-task reference for boolq"}
    text = format_metrics({**without, "without_test_rows": ["cola"]})
    assert "Δm% not available: no single-task reference for boolq" in text
    assert "not scored, because there are no test rows: cola" in text


def test_one_task_has_no_worst_task_and_needs_no_single_task_references():
    one = {
        **METRICS,
        "tasks": {"boolq": METRICS["tasks"]["boolq"]},
        "delta_m": None,
        "delta_m_reason": "none given",
    }
    text = format_metrics(one)
    assert "worst task" not in text
    assert "Δm%" not in text
    assert "Δm% +1.00" in format_metrics({**one, "delta_m": 1.0})


def test_no_task_at_all_is_shown_as_such():
    empty = {
        "tasks": {},
        "mean": None,
        "worst": None,
        "std": None,
        "delta_m": None,
        "delta_m_reason": "no task",
    }
    text = format_metrics(empty)
    assert "mean" in text
    assert "worst" not in text
