"""From rows to task scores, and the majority answer."""

import dataclasses

import pytest

from braidlora.comparison._references import majority_entry
from braidlora.errors import DataError
from braidlora.evaluation.scoring import (
    majority_score,
    majority_scores,
    record,
    references,
    summarize,
    task_metrics,
)
from braidlora.tasks import Task, get_template, option_texts


def make_task(train=(), test=(), kind="generate", metric="accuracy", extract="none") -> Task:
    template = get_template("alpaca", kind)
    return Task(
        "t", kind, template, list(train), [], list(test), metric=metric, extract=extract, labels=["x", "y"]
    )


def row(output: str, **more: str | list[str]) -> dict[str, str | list[str]]:
    return {"instruction": "q", "input": "", "output": output, **more}


BOOLQ = [row("the correct answer is true", answer="true"), row("the correct answer is false", answer="false")]


def test_unparsed_answers_are_counted_and_wrong():
    task = make_task(test=[*BOOLQ, *BOOLQ], extract="boolq")
    expected = references(task)
    assert expected == ["true", "false", "true", "false"]
    predictions = ["the correct answer is true", "", "I can not say", "Is it false? It is true."]
    records = [record(task, i, "p", expected[i], predictions[i]) for i in range(4)]
    assert [line["extracted"] for line in records] == ["true", None, None, "false"]
    assert [line["score"] for line in records] == [100.0, 0.0, 0.0, 100.0]
    assert task_metrics(task, records) == {"metric": "accuracy", "score": 50.0, "n": 4, "unparsed": 2}


def test_the_answer_column_is_the_reference_and_output_stands_in():
    assert references(make_task(test=[row("long text", answer="short"), row("only")])) == ["short", "only"]
    with pytest.raises(DataError, match="task t, test row 0"):
        references(make_task(test=[row("no choice here")], extract="piqa"))


def test_any_of_several_right_answers_counts():
    several = row("test", answer=["test", "best", "west"])
    task = make_task(test=[several, row("one", answer="one")], metric="exact_match")
    expected = references(task)
    assert expected == [["test", "best", "west"], "one"]
    records = [record(task, 0, "p", expected[0], text) for text in ("west", " best\n", "rest")]
    assert [line["score"] for line in records] == [100.0, 100.0, 0.0]
    assert records[0]["reference"] == ["test", "best", "west"]
    numbers = make_task(test=[row("It is 3.", answer=["3", "4"])], extract="number")
    assert references(numbers) == [["3", "4"]]
    # The majority answer is one that training showed, and each right answer of an option stands for its output.
    same = row("same", answer=["same", "yes"])
    assert majority_score(make_task([same, same, row("no")], [row("yes", answer=["yes", "same"])])) == 100.0
    assert option_texts(dataclasses.replace(make_task([same]), options=["yes"])) == ["same"]


def test_the_majority_answer_of_training_scored_on_test():
    train = [BOOLQ[1], BOOLQ[0], BOOLQ[0]]
    assert majority_score(make_task(train, [*BOOLQ, BOOLQ[0]], extract="boolq")) == pytest.approx(200 / 3)
    # a tie goes to the answer seen first
    assert majority_score(make_task([row("b"), row("a")], [row("b")])) == 100.0
    assert majority_score(make_task([row("big dog")], [row("big cat")], metric="rouge1")) == pytest.approx(
        50.0
    )
    labels = [{"text": "t", "label": label} for label in "xyy"]
    assert majority_score(make_task(labels, labels, kind="classify")) == pytest.approx(200 / 3)


def test_an_option_reads_as_the_output_that_training_has_for_it():
    task = make_task([*BOOLQ, BOOLQ[0], row("a", answer="c"), row("b", answer="c")])
    texts = {"true": "the correct answer is true", "c": "c", "never seen": "never seen"}
    assert option_texts(dataclasses.replace(task, options=list(texts))) == list(texts.values())
    assert option_texts(task) == []


@pytest.mark.parametrize(
    ("extract", "without", "right"),
    [("number", row("ten apples"), row("It is 3.")), ("AQuA", row("Adding both gives A + B."), row("3"))],
)
def test_training_rows_without_an_answer_do_not_count_for_the_majority(extract, without, right):
    right = {**right, "answer": "B"} if extract == "AQuA" else right
    assert majority_score(make_task([without, without, right], [right], extract=extract)) == 100.0
    task = make_task([without], [right], extract=extract)
    assert majority_score(task) is None
    assert majority_scores([task]) == {}
    assert majority_entry([task]) == {
        "majority": {"tasks": {}, "mean": None},
        "majority_reason": "no training rows with an answer: t",
    }


def test_there_is_no_majority_without_rows():
    with pytest.raises(DataError, match="no training rows"):
        majority_score(make_task([], BOOLQ))
    with pytest.raises(DataError, match="no test rows"):
        majority_score(make_task(BOOLQ, []))


def test_the_summary_keeps_the_contract_of_metrics_json():
    tasks = {
        "a": {"metric": "accuracy", "score": 80.0, "n": 5},
        "b": {"metric": "rouge1", "score": 40.0, "n": 2},
    }
    got = summarize(tasks, {"a": 100.0, "b": 50.0}, ["c"])
    assert got == {
        "tasks": tasks, "mean": 60.0, "worst": 40.0, "worst_task": "b", "std": 20.0, "delta_m": pytest.approx(20.0),
        "without_test_rows": ["c"],
    }  # fmt: skip
    without = summarize(tasks, {"a": 100.0})
    assert without["delta_m"] is None
    assert "b" in without["delta_m_reason"]
