"""Predictions are `evaluate`'s and plain PEFT's, in any form of the adapter and at any batch size."""

import json
import re
import shutil
import warnings

import pytest

import braidlora
from braidlora.config import load_config
from braidlora.errors import ConfigError, DataError
from braidlora.runs import MANIFEST
from braidlora.tasks import load_tasks

NAMES = ["classifier", "writer"]
TASKS = {"classifier": ["topic", "tone"], "writer": ["rising", "mood"]}


@pytest.fixture
def runs(classifier, writer):
    return {"classifier": classifier, "writer": writer}


def rows_of(run):
    return {task.name: task.test for task in load_tasks(load_config(run / "config.yaml"))}


def evaluated(run, task):
    lines = (run / "predictions" / f"{task}.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "index" in record]
    return [record["prediction"] for record in sorted(records, key=lambda record: record["index"])]


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    return code.replace('"PATH_OF_THIS_FOLDER"', repr(str(folder)))


def answer_of_code(folder, row, index):
    """What the code of the model card answers to a row of the task number `index`."""
    code = code_of(folder).replace('card["tasks"][0]', f'card["tasks"][{index}]')
    if "text" in row:
        code = code.replace("YOUR TEXT", row["text"])
    else:
        code = code.replace("YOUR INSTRUCTION", row["instruction"])
        code = code.replace('"input": ""', f'"input": {row["input"]!r}')
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, found)
    return found["answer"]


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_predictions_are_those_of_its_evaluation(name, runs):
    model = braidlora.load(runs[name])
    for task, rows in rows_of(runs[name]).items():
        given = [{key: row[key] for key in ("text", "instruction", "input") if key in row} for row in rows]
        found = model.predict(given, task)
        assert [one["prediction"] for one in found] == evaluated(runs[name], task)
        assert [one["row"] for one in found] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("form", ["adapter", "lora", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_the_model_card_gives_the_same_answers(name, form, forms, runs):
    folder = forms[name, form]
    model = braidlora.load(folder)
    assert model.tasks == TASKS[name]
    for index, (task, rows) in enumerate(rows_of(runs[name]).items()):
        for row in rows[:2]:
            given = {key: row[key] for key in ("text", "instruction", "input") if key in row}
            assert answer_of_code(folder, given, index) == model.predict(given, task)[0]["prediction"]


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_changes_no_answer(name, runs):
    model = braidlora.load(runs[name])
    task = TASKS[name][-1]
    rows = [
        {key: row[key] for key in ("text", "instruction") if key in row} for row in rows_of(runs[name])[task]
    ]
    modes = [None] if name == "classifier" else ["rank", "generate"]
    for mode in modes:
        one, many = (model.predict(rows, task, batch_size=size, mode=mode) for size in (1, 5))
        assert [line["prediction"] for line in one] == [line["prediction"] for line in many]
        if mode != "generate":
            for first, second in zip(one, many, strict=True):
                assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)


def test_probabilities_are_of_the_tasks_own_labels(classifier):
    model = braidlora.load(classifier / "adapter")
    (line,) = model.predict("abc", "tone")
    assert list(line["probabilities"]) == ["red", "sad"] or list(line["probabilities"]) == ["sad", "red"]
    assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
    assert model.labels("topic") == ["red", "blue", "green"]


def test_options_are_ranked_on_request(writer):
    (line,) = braidlora.load(writer).predict("not bad at all", "mood", mode="rank")
    assert set(line["probabilities"]) == {"positive", "negative"}
    assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_tasks_and_modes_that_do_not_fit_are_refused(classifier, writer):
    model = braidlora.load(classifier)
    with pytest.raises(ConfigError, match=r"several tasks; choose one of topic, tone"):
        model.predict("abc")
    with pytest.raises(
        ConfigError, match=r"no task 'topics'. Did you mean 'topic'\? Its tasks are topic, tone"
    ):
        model.predict("abc", "topics")
    with pytest.raises(ConfigError, match="classifier's head"):
        model.predict("abc", "tone", mode="rank")
    with pytest.raises(ConfigError, match="a classifier writes no text"):
        model.generate("abc")
    with pytest.raises(DataError, match=r"row 2: no column 'sentence' \(or `text`\); the row has words"):
        model.predict([{"sentence": "a"}, {"words": "b"}], "tone")
    with pytest.raises(ConfigError, match="`rank` chooses among a task's options, but rising has none"):
        braidlora.load(writer).predict("1 2", "rising", mode="rank")


def test_a_row_may_have_the_trainings_column_or_the_fields_own_name(classifier):
    model = braidlora.load(classifier / "adapter")
    first, second, third = model.predict([{"sentence": "abc"}, {"text": "abc"}, "abc"], "topic")
    assert first["probabilities"] == pytest.approx(second["probabilities"])
    assert first["probabilities"] == pytest.approx(third["probabilities"])


def test_an_adapter_without_prompts_needs_its_recipe(classifier, tmp_path):
    """As folders of earlier versions, and those of PEFT alone."""
    away = shutil.copytree(classifier / "adapter", tmp_path / "away")
    (away / MANIFEST).unlink()
    card = json.loads((away / "braidlora.json").read_text())
    del card["prompt"]
    (away / "braidlora.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="earlier version, without prompts; give the recipe"):
        braidlora.load(away)
    model = braidlora.load(away, recipe=classifier / "config.yaml")
    expected = braidlora.load(classifier).predict("abc", "tone")
    assert model.predict("abc", "tone") == expected
