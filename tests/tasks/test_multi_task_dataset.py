"""The dataset of all tasks' encoded rows, its counts, the report and the fingerprints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from task_helpers import byte_level_tokenizer, config_of, encode_example, questions

from braidlora.config import PromptSection, RunConfig
from braidlora.errors import DataError
from braidlora.tasks import (
    IGNORED,
    LabelSpace,
    data_report,
    encode_tasks,
    fingerprint,
    fingerprints,
    load_tasks,
)

TOKENIZER = byte_level_tokenizer()


@pytest.fixture
def two_tasks(rows_file):
    def load(**sections):
        tasks = [
            {"name": "few", "train": rows_file(questions(3), "few.jsonl")},
            {"name": "many", "train": rows_file(questions(5, 50), "many.jsonl")},
        ]
        return load_tasks(RunConfig.model_validate({"tasks": tasks, **sections}))

    return load


def test_items_are_the_encoded_rows_in_the_tasks_order(two_tasks):
    tasks, prompt = two_tasks(), PromptSection()
    dataset = encode_tasks(tasks, TOKENIZER, prompt)
    assert len(dataset) == 8
    assert dataset.task_names == ["few", "many"]
    assert dataset.task_ids == [0, 0, 0, 1, 1, 1, 1, 1]
    expected = [encode_example(row, task.template, TOKENIZER, prompt) for task in tasks for row in task.train]
    for item, encoded in zip(dataset, expected, strict=True):
        assert encoded is not None
        assert item["input_ids"] == encoded.input_ids
        assert item["labels"] == encoded.labels
    assert dataset.lengths() == [len(item["input_ids"]) for item in dataset]
    assert dataset.counts["many"].loss_tokens == sum(
        label != IGNORED for item in list(dataset)[3:] for label in item["labels"]
    )


def test_train_on_prompt_survives_the_storage(two_tasks):
    dataset = encode_tasks(two_tasks(), TOKENIZER, PromptSection(train_on_prompt=True))
    for item in dataset:
        assert item["labels"] == [IGNORED, *item["input_ids"][1:]]


def test_dropped_and_truncated_rows_are_counted(rows_file):
    rows = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "long " * 100, "output": "yes"},
        {"instruction": "short", "output": "yes " * 100},
    ]
    tasks = load_tasks(config_of(rows_file(rows)))
    dataset = encode_tasks(tasks, TOKENIZER, PromptSection(template="alpaca_short", cutoff=40))
    counts = asdict(dataset.counts["t"])
    assert (counts["rows"], counts["truncated"], counts["dropped"]) == (2, 2, 1)
    assert counts["longest"] == 40
    with pytest.raises(DataError, match=r"task t, train: all 3 rows were dropped.*prompt\.cutoff=8.*Raise"):
        encode_tasks(
            [replace(tasks[0], train=[rows[2] | {"input": ""}] * 3)], TOKENIZER, PromptSection(cutoff=8)
        )


def test_the_validation_part_may_be_empty_and_the_training_part_may_not(rows_file):
    tasks = load_tasks(RunConfig.model_validate({"tasks": [{"name": "t", "test": rows_file(questions(2))}]}))
    assert len(encode_tasks(tasks, TOKENIZER, PromptSection(), "validation")) == 0
    with pytest.raises(DataError, match="no task has training rows"):
        encode_tasks(tasks, TOKENIZER, PromptSection())


def test_classify_items_carry_the_class_in_the_union(rows_file):
    shades = rows_file([{"text": "x", "label": "dark"}, {"text": "y", "label": "light"}], "a.jsonl")
    weights = rows_file([{"text": "z", "label": "light"}, {"text": "w", "label": "heavy"}], "b.jsonl")
    tasks = load_tasks(
        RunConfig.model_validate(
            {
                "tasks": [
                    {"name": "shade", "kind": "classify", "train": shades},
                    {"name": "weight", "kind": "classify", "train": weights},
                ]
            }
        )
    )
    dataset = encode_tasks(tasks, TOKENIZER, PromptSection())
    assert LabelSpace.of(tasks).names == ["dark", "light", "heavy"]
    assert [item["labels"] for item in dataset] == [0, 1, 1, 2]
    assert [item["task_id"] for item in dataset] == [0, 0, 1, 1]
    assert dataset[3]["input_ids"] == TOKENIZER("w")["input_ids"]


def test_the_report_is_json_and_says_what_became_of_every_row(rows_file):
    rows = [{**row, "of": "t"} for row in questions(10)] + [{"of": "other"}, {"of": "t", "instruction": None}]
    test = rows_file(questions(2, 9), "test.jsonl")
    source = {"source": rows_file(rows), "where": {"of": "t"}, "limit": 8}
    config = config_of(source, task={"test": test}, prompt={"bad_rows": "skip"}, split={"validation": 0.25})
    tasks = load_tasks(config)
    train = encode_tasks(tasks, TOKENIZER, config.prompt)
    report = json.loads(json.dumps(data_report(tasks, {"train": train})))
    assert report["fingerprint"] == fingerprint(tasks)
    parts = report["tasks"]["t"]
    assert {key: parts["train"][key] for key in ("read", "filtered", "skipped", "not_drawn", "cut", "kept")} == {
        "read": 12, "filtered": 1, "skipped": 1, "not_drawn": 2, "cut": 2, "kept": 6,
    }  # fmt: skip
    assert parts["train"]["encoded"]["rows"] == parts["train"]["rows"] == 6
    assert parts["validation"]["rows"] == 2
    trained = {row["instruction"] for row in tasks[0].train}
    assert parts["test"]["in_train"] == sum(row["instruction"] in trained for row in tasks[0].test)
    assert parts["train"]["sha256"] == fingerprints(tasks)["t"]["train"]


def test_in_train_counts_test_prompts_that_were_trained_on(rows_file):
    tasks = load_tasks(
        config_of(rows_file(questions(5)), task={"test": rows_file(questions(4, 3), "test.jsonl")})
    )
    assert data_report(tasks)["tasks"]["t"]["test"]["in_train"] == 2


def test_the_fingerprint_moves_with_anything_that_training_would_see(two_tasks, rows_file):
    tasks = two_tasks()
    first = fingerprint(tasks)
    assert first == fingerprint(two_tasks())
    row = {**tasks[1].train[4], "output": "other"}
    changed = [
        [tasks[1], tasks[0]],
        [tasks[0], replace(tasks[1], train=[*tasks[1].train[:4], row])],
        [tasks[0], replace(tasks[1], train=tasks[1].train[::-1])],
        [tasks[0], replace(tasks[1], name="renamed")],
        two_tasks(prompt={"template": "alpaca_short"}),
    ]
    assert len({first, *map(fingerprint, changed)}) == 6
    moved = fingerprints(changed[1])
    assert moved["few"] == fingerprints(tasks)["few"]
    assert moved["many"]["train"] != fingerprints(tasks)["many"]["train"]
