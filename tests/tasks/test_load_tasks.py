"""From a recipe to tasks: columns, filters, limits, splits, defaults, and what makes a task unusable."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_helpers import config_of, questions

from braidlora.config import RunConfig, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.tasks import data_report, load_tasks, size_line


def load(train, *, task=None, **sections):
    return load_tasks(config_of(train, task=task, **sections))[0]


def test_a_generate_row_has_all_its_fields(rows_file):
    path = rows_file(
        [
            {"instruction": "i", "output": "o"},
            {"instruction": "i", "input": "in", "output": "o", "answer": "a"},
            {"instruction": "i", "input": None, "output": 7, "answer": True},
            {"instruction": "", "input": "only", "output": 2.5, "answer": ""},
        ]
    )
    assert load(path).train == [
        {"instruction": "i", "input": "", "output": "o", "answer": "o"},
        {"instruction": "i", "input": "in", "output": "o", "answer": "a"},
        {"instruction": "i", "input": "", "output": "7", "answer": "true"},
        {"instruction": "", "input": "only", "output": "2.5", "answer": "2.5"},
    ]


def test_columns_are_mapped_and_a_wrong_name_says_which_exist(rows_file):
    path = rows_file([{"question": "q", "context": "c", "reply": "r", "gold": "g"}])
    columns = {"instruction": "question", "input": "context", "output": "reply", "answer": "gold"}
    row = {"instruction": "q", "input": "c", "output": "r", "answer": "g"}
    assert load(path, task={"columns": columns}).train == [row]
    with pytest.raises(DataError, match=r"no column 'instruction'.*question.*tasks\.t\.columns\.instruction"):
        load(path)
    with pytest.raises(DataError, match=r"no column 'ctx', which tasks\.t\.columns\.input names"):
        load(path, task={"columns": {**columns, "input": "ctx"}})


def test_an_answer_may_be_a_list_of_right_answers(rows_file):
    given = [
        {"instruction": f"q{number}", "output": "b", "answers": answers}
        for number, answers in enumerate([["b", "c", "b"], ["only"], "text"])
    ]
    task = load(rows_file(given), task={"columns": {"answer": "answers"}, "test": rows_file(given)})
    assert [row["answer"] for row in task.test] == [["b", "c"], "only", "text"]
    assert [row["output"] for row in task.train] == ["b", "b", "b"]
    assert data_report([task])["tasks"]["t"]["test"]["in_train"] == 3


@pytest.mark.parametrize("answers", [[], ["a", " "], ["a", None], ["a", ["b"]]])
def test_a_list_of_answers_holds_texts(rows_file, answers):
    path = rows_file([{"instruction": "q", "output": "b", "answers": answers}])
    with pytest.raises(DataError, match="the column 'answers'"):
        load(path, task={"columns": {"answer": "answers"}})


def test_a_test_row_may_have_an_answer_only_and_a_training_row_may_not(rows_file):
    train = rows_file(questions(2))
    test = rows_file([{"instruction": "i", "answer": "4"}], "test.jsonl")
    row = {"instruction": "i", "input": "", "output": "4", "answer": "4"}
    assert load(train, task={"test": test}).test == [row]
    with pytest.raises(DataError, match="no column 'output'"):
        load(test)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"kind": "a"}, [0, 3]),
        ({"kind": ["a", "b"]}, [0, 1, 3]),
        ({"kind": "a", "level": 2}, [3]),
        ({"level": "2"}, [1, 3]),
        ({"flag": True}, [0]),
        ({"flag": "false"}, [1]),
    ],
)
def test_where_keeps_rows_whose_column_fits(rows_file, where, kept):
    marks = [
        {"kind": "a", "level": 1, "flag": True},
        {"kind": "b", "level": 2, "flag": False},
        {"kind": "c", "level": 3},
        {"kind": "a", "level": 2},
    ]
    path = rows_file([{**row, **mark} for row, mark in zip(questions(4), marks, strict=True)])
    task = load({"source": path, "where": where})
    assert [row["instruction"] for row in task.train] == [f"question {n}" for n in kept]
    assert task.counts["train"].filtered == 4 - len(kept)


def test_where_that_fits_nothing_lists_the_known_values(rows_file):
    path = rows_file(
        [{**row, "task": name} for row, name in zip(questions(2), ["cola", "snli"], strict=True)]
    )
    with pytest.raises(DataError, match=r"none of the 2 rows .* the values of 'task' are cola, snli"):
        load({"source": path, "where": {"task": "cole"}})
    with pytest.raises(DataError, match=r"no column 'kind' \(the columns are instruction, output, task\)"):
        load({"source": path, "where": {"kind": "cola"}})


def test_an_empty_source_and_one_with_bad_rows_only_are_errors(rows_file):
    with pytest.raises(DataError, match=r"task t, train: no rows: .*empty\.jsonl is empty"):
        load(rows_file([], "empty.jsonl"))
    with pytest.raises(DataError, match=r"0 were filtered out and 1 were bad. The first: .*bad\.jsonl:1: "):
        load(rows_file([{"instruction": None}], "bad.jsonl"), prompt={"bad_rows": "skip"})


def test_limit_draws_with_the_seed_and_a_larger_limit_keeps_the_smaller_ones_rows(rows_file):
    path = rows_file(questions(100))
    draws = {
        (limit, seed): [row["instruction"] for row in load({"source": path, "limit": limit}, seed=seed).train]
        for limit in (10, 20)
        for seed in (0, 1)
    }
    assert all(len(set(drawn)) == limit for (limit, _), drawn in draws.items())
    assert set(draws[10, 0]) < set(draws[20, 0])
    assert set(draws[10, 0]) != set(draws[10, 1])
    assert draws[10, 0] == [row["instruction"] for row in load({"source": path, "limit": 10}).train]
    assert draws[10, 0] != [f"question {n}" for n in range(10)]
    task = load({"source": path, "limit": 500})
    assert (len(task.train), task.counts["train"].not_drawn) == (100, 0)
    assert load({"source": path, "limit": 10}).counts["train"].not_drawn == 90


def test_runs_that_differ_in_seed_alone_are_scored_on_the_same_rows(rows_file):
    train, test = rows_file(questions(50)), rows_file(questions(100, start=50), "test.jsonl")

    def loaded(**seeds):
        return load({"source": train, "limit": 10}, task={"test": {"source": test, "limit": 10}}, **seeds)

    first, second = loaded(seed=1), loaded(seed=2)
    assert first.train != second.train
    assert first.test == second.test
    assert loaded(seed=1, split={"seed": 5}).test != first.test


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.integers(0, 30), min_size=4, max_size=60),
    validation=st.floats(0.0, 0.4),
    test=st.floats(0.0, 0.4),
    seed=st.integers(0, 5),
)
def test_a_split_loses_no_row_and_no_prompt_stands_on_two_sides(rows_file, prompts, validation, test, seed):
    rows = [
        {"instruction": f"q{prompt}", "output": f"a{position}"} for position, prompt in enumerate(prompts)
    ]
    split = {"validation": validation, "test": test, "seed": seed}
    path = rows_file(rows)
    if len(set(prompts)) < 3:
        return  # too few different prompts to cut anything from
    task = load(path, split=split)
    parts = [task.train, task.validation, task.test]
    assert sorted(row["output"] for part in parts for row in part) == sorted(row["output"] for row in rows)
    prompts_of = [{row["instruction"] for row in part} for part in parts]
    assert not prompts_of[0] & prompts_of[1]
    assert not prompts_of[0] & prompts_of[2]
    assert not prompts_of[1] & prompts_of[2]
    assert bool(task.validation) == (validation > 0)
    assert bool(task.test) == (test > 0)
    counts = task.counts["train"]
    assert counts.read == counts.kept + counts.cut == len(rows)


def test_the_split_has_the_sizes_asked_for_and_its_own_seed(rows_file):
    path = rows_file(questions(100))
    task = load(path, split={"validation": 0.1, "test": 0.25})
    assert (len(task.train), len(task.validation), len(task.test)) == (65, 10, 25)
    assert task.test == load(path, split={"validation": 0.1, "test": 0.25}, seed=9).test
    assert task.test != load(path, split={"validation": 0.1, "test": 0.25, "seed": 1}).test


def test_the_sizes_of_the_parts_in_words(rows_file):
    path = rows_file(questions(60))
    split = {"validation": 0.1, "test": 0.2}
    held = "split holds out validation and test"
    assert size_line(load(path, split=split)) == f"60 rows: 42 train, 6 validation, 12 test ({held})"
    limited = {"source": path, "limit": 30}
    assert size_line(load(limited, split=split)) == (
        "30 rows (train.limit, of 60): 21 train, 3 validation, 6 test "
        f"({held}, from the rows that train.limit draws)"
    )
    assert size_line(load(path, task={"test": {"limit": 5}}, split=split)) == (
        f"60 rows: 42 train, 6 validation, 5 test ({held}, test.limit draws from 12)"
    )
    other = rows_file(questions(5), "test.jsonl")
    assert size_line(load(path, task={"test": other})) == "60 train, 5 test rows"


def test_own_validation_and_test_rows_are_left_alone_by_the_split(rows_file):
    other = rows_file(questions(3, 100), "other.jsonl")
    task = load(rows_file(questions(20)), task={"test": other}, split={"validation": 0.2, "test": 0.2})
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 4, 3)
    assert all(row["instruction"].startswith("question 10") for row in task.test)


def test_rows_that_cannot_be_split_say_so(rows_file):
    path = rows_file([{"instruction": "same", "output": str(n)} for n in range(8)])
    with pytest.raises(
        DataError, match="task t: 8 rows with 1 distinct prompts cannot be split into train and val"
    ):
        load(path, split={"validation": 0.1})


def test_a_task_may_be_only_tested(rows_file):
    config = RunConfig.model_validate({"tasks": [{"name": "t", "test": rows_file(questions(3))}]})
    task = load_tasks(config)[0]
    assert (task.train, len(task.test)) == ([], 3)


def test_a_task_without_any_rows_is_refused_in_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks:\n  - name: t\n")
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml:2: tasks\.0: has neither rows to train nor to test on"
    ):
        load_config(recipe)


def test_an_override_for_all_tasks_leaves_sources_alone_that_a_task_has_not(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks:\n  - {name: a, train: a.json}\n  - {name: b, test: b.json}\n")
    tasks = load_config(recipe, ["tasks.*.train.limit=5"]).tasks
    assert tasks[0].train is not None
    assert tasks[0].train.limit == 5
    assert tasks[1].train is None


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ({}, "exact_match"),
        ({"extract": "number"}, "accuracy"),
        ({"metric": "rougeL"}, "rougeL"),
        ({"kind": "classify", "columns": {"text": "instruction", "label": "output"}}, "accuracy"),
    ],
)
def test_the_metric_follows_the_kind_unless_given(rows_file, task, metric):
    assert load(rows_file(questions(4)), task=task).metric == metric


def test_options_max_new_tokens_and_extract_reach_the_task(rows_file):
    rows = [{"instruction": "i", "output": "yes"}, {"instruction": "j", "output": "so it is", "answer": "no"}]
    given = {"options": ["no", "yes"], "max_new_tokens": 5, "extract": "boolq"}
    task = load(rows_file(rows), task=given)
    assert (task.options, task.max_new_tokens, task.extract) == (["no", "yes"], 5, "boolq")
    with pytest.raises(DataError, match="'no' is not one of the task's options: maybe, yes"):
        load(rows_file(rows), task={"options": ["maybe", "yes"]})
    with pytest.raises(ConfigError, match="an option is given twice"):
        load(rows_file(rows), task={"options": ["yes", "yes"]})


def test_with_options_the_reference_is_one_of_them(rows_file):
    """`rank` predicts an option: compared with a number, every letter would be wrong."""
    letters = {"options": ["A", "B", "C", "D"], "mode": "rank"}
    path = rows_file([{"instruction": f"question {n}", "output": "ABCD"[n], "answer": n} for n in range(4)])
    with pytest.raises(DataError) as error:
        load(path, task=letters)
    assert (
        "rows.jsonl:1: the column 'answer', which a prediction is scored against, has '0', which is not one of the "
        "task's options: A, B, C, D; the row's output 'A' is one. To score against the output, set "
        "columns.answer=output (task t, train)."
    ) in str(error.value)
    task = load(path, task={**letters, "columns": {"answer": "output"}})
    assert [row["answer"] for row in task.train] == ["A", "B", "C", "D"]
    mapped = rows_file([{"question": "q", "letter": "B", "number": 2}], "mapped.jsonl")
    columns = {"instruction": "question", "output": "letter", "answer": "number"}
    with pytest.raises(DataError, match=r"the column 'number'.*set columns\.answer=letter"):
        load(mapped, task={**letters, "columns": columns})
    spaced = rows_file([{"instruction": "q", "output": "B", "answer": "B "}], "spaced.jsonl")
    assert load(spaced, task=letters).train, "predictions are compared up to whitespace"
    several = rows_file([{"instruction": "q", "output": "B", "answer": ["b)", "B"]}], "several.jsonl")
    assert load(several, task=letters).train[0]["answer"] == ["b)", "B"]
    # The extractor finds the option in the answer, or the answer is the bare option of a longer output.
    sentence = rows_file([{"instruction": "q", "output": "true", "answer": "it is true"}], "sentence.jsonl")
    assert load(sentence, task={"options": ["true", "false"], "extract": "boolq"}).train
    bare = rows_file([{"instruction": "q", "output": "it is true", "answer": "true"}], "bare.jsonl")
    assert load(bare, task={"options": ["true", "false"]}).train


def test_of_a_chat_with_options_the_reference_is_one_of_them(rows_file):
    turns = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "B"}]
    path = rows_file([{"messages": turns, "right": 2}])
    with pytest.raises(DataError, match=r"the column 'right'.*has '2'.*Leave out columns\.answer"):
        load(path, task={"options": ["A", "B"], "columns": {"answer": "right"}})
    assert load(path, task={"options": ["A", "B"]}).train[0]["answer"] == "B"


def test_labels_are_all_that_occur_even_where_a_limit_drew_none_of_them(rows_file):
    rows = [{"text": f"x{n}", "label": "common"} for n in range(30)] + [{"text": "y", "label": "rare"}]
    test = rows_file([{"text": "z", "label": 3}], "test.jsonl")
    task = load({"source": rows_file(rows), "limit": 2}, task={"kind": "classify", "test": test})
    assert task.labels == ["3", "common", "rare"]
    given = {"kind": "classify", "options": ["rare", "common"]}
    assert load(rows_file(rows), task=given).labels == ["rare", "common"]
    with pytest.raises(DataError, match=r"test\.jsonl:1: the label '3' is not one of the task's options"):
        load(rows_file(rows), task={**given, "test": test})


def test_a_task_has_its_own_template_or_the_recipes(rows_file):
    path = rows_file(questions(2))
    assert load(path, prompt={"template": "alpaca_short"}).template.name == "alpaca_short"
    own = load(path, task={"template": "Q: {instruction}\n{input}"}, prompt={"template": "alpaca_short"})
    assert own.template.prompt(own.train[0]) == "Q: question 0\n"


def test_inputs_that_the_template_never_shows_are_warned_of(rows_file):
    path = rows_file([{"instruction": "i", "input": "lost", "output": "o"}])
    with pytest.warns(UserWarning, match="1 training rows have an `input`, but the template does not use it"):
        load(path, prompt={"template": "{instruction}"})


@pytest.mark.parametrize("setting", ["packing", "train_on_prompt"])
def test_settings_without_meaning_for_classify_are_refused(rows_file, setting):
    path = rows_file([{"text": "x", "label": "y"}])
    with pytest.raises(ConfigError, match=rf"prompt\.{setting}: `classify` tasks have no answer tokens"):
        load(path, task={"kind": "classify"}, prompt={setting: True})


def test_an_extractor_has_no_meaning_for_a_classify_task(rows_file):
    path = rows_file([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(ConfigError, match=r"tasks\.t\.extract: a `classify` task predicts a label"):
        load(path, task={"kind": "classify", "extract": "number"})


def test_a_generated_task_brings_test_rows_options_and_metric():
    task = load("generated:count")
    assert (len(task.train), len(task.test), task.metric) == (300, 100, "exact_match")
    assert task.options == ["0", "1", "2", "3", "4"]
    assert set(task.train[0]) == {"instruction", "input", "output", "answer"}
    assert task.train == load("generated:count", seed=5).train
    assert task.train != load("generated:count", split={"seed": 5}).train


def test_the_limits_of_a_generated_task_are_how_many_rows_are_made():
    task = load(
        {"source": "generated:count", "limit": 400}, task={"test": {"source": "generated:count", "limit": 30}}
    )
    assert (len(task.train), len(task.test)) == (400, 30)
    trained = {row["instruction"] for row in task.train}
    assert not any(row["instruction"] in trained for row in task.test)


@pytest.mark.parametrize(
    ("train", "task", "error", "message"),
    [
        ("generated:cuont", {}, DataError, "unknown cuont; known are"),
        ("generated:count", {"validation": "generated:count"}, ConfigError, r"set split\.validation"),
        (
            "generated:count",
            {"test": "generated:rising"},
            ConfigError,
            "trains and tests on different generated tasks",
        ),
        ({"source": "generated:count", "where": {"a": 1}}, {}, ConfigError, "takes only `limit`"),
    ],
)
def test_what_a_generated_task_cannot_do_is_refused(train, task, error, message):
    with pytest.raises(error, match=message):
        load(train, task=task)
