"""What is probably wrong with rows: every finding has its message, and rows in order have none."""

import json
import warnings

import pytest

from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataError, DataWarning
from braidlora.tasks import encode_tasks, load_tasks
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows


def recipe(tmp_path, train, test=(), *, kind="classify", sections=None, limit=None, **task):
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "name": "t",
        "kind": kind,
        "train": {"source": str(tmp_path / "train.jsonl"), "limit": limit},
        **task,
    }
    if test:
        section["test"] = str(tmp_path / "test.jsonl")
    return RunConfig.model_validate({"tasks": [section], **(sections or {})})


def texts(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def asked(*answers):
    return [{"instruction": f"question {number}", "output": answer} for number, answer in enumerate(answers)]


def found(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return warn_of_rows(load_tasks(config), config)


def test_rows_in_order_give_no_warning(tmp_path):
    config = recipe(tmp_path, texts(*"aabb"), texts(*"ab"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_of_rows(load_tasks(config), config) == []


def test_a_test_label_that_training_never_saw(tmp_path):
    config = recipe(tmp_path, texts(*"aabb"), texts(*"abccd"))
    with pytest.warns(DataWarning) as caught:
        warn_of_rows(load_tasks(config), config)
    assert [str(one.message) for one in caught] == [
        "task t: 3 of 5 test rows have a label that no training row has: 'c' (2), 'd' (1); they will almost certainly "
        "be wrong. Add training rows with it, or leave these test rows out with `where`."
    ]


def test_labels_that_differ_in_case_are_named(tmp_path):
    [text] = found(recipe(tmp_path, texts("good", "bad"), texts("good", "Bad")))
    assert "Is 'Bad' the same as 'bad'? Then give both the same spelling." in text


def test_a_limit_that_drew_no_row_of_a_label_is_named(tmp_path):
    [text] = found(recipe(tmp_path, texts(*"aaaaaaaaaaaaaaab"), texts(*"ab"), limit=2))
    assert "`limit` draws 2 of 16 training rows of this task; draw more." in text


def test_labels_of_which_training_has_none_are_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"task t: no test row has a label that training sees\. Test: 'yes' \(1\), 'no' \(1\); training: '0', '1'",
    ):
        found(recipe(tmp_path, texts("0", "1"), texts("yes", "no")))


def test_a_positive_label_must_be_one_of_the_rows_labels(tmp_path):
    for part in (texts(*"aabb"), []):  # or found in another part
        config = recipe(tmp_path, texts(*"aabb"), part, metric="f1", positive="b")
        assert found(config) == []
        config = recipe(tmp_path, texts(*"aabb"), part, metric="f1", positive="c")
        with pytest.raises(
            ConfigError, match=r"tasks\.t\.positive: 'c' is not one of the task's labels 'a', 'b'\."
        ):
            found(config)
        assert warn_of_rows(load_tasks(config), config, whole=False) == [], "another site may have such rows"


def test_answers_of_a_language_model_are_checked_where_they_are_labels(tmp_path):
    few = asked(*(["yes", "no"] * 5))
    [text] = found(recipe(tmp_path, few, asked("yes", "maybe"), kind="generate"))
    assert "1 of 2 test rows have an answer that no training row has: 'maybe' (1)" in text
    free = asked(*map(str, range(10)))
    assert found(recipe(tmp_path, free, asked("11", "12"), kind="generate")) == []


def test_an_answer_column_is_not_a_label_column(tmp_path):
    config = recipe(
        tmp_path, texts(*(f"a long answer {number}" for number in range(30))), texts("a long answer 1")
    )
    with pytest.raises(
        DataError,
        match=r"its 30 training rows have 30 different labels, 30 of them only once, such as 'a long answer 0'.*"
        r"name another one in columns\.label, or make it a `generate` task.*list them in `options`",
    ):
        found(config)
    listed = recipe(
        tmp_path, texts(*map(str, range(30))), texts("1"), options=[str(number) for number in range(30)]
    )
    assert found(listed) == []


def test_a_metric_that_counts_long_texts_word_for_word(tmp_path):
    long = asked(*(f"{number} " + "word " * 30 for number in range(10)))
    [text] = found(recipe(tmp_path, long, long[:4], kind="generate"))
    assert (
        "metric exact_match counts answers that are the same word for word, and these have 31 words" in text
    )
    assert found(recipe(tmp_path, long, long[:4], kind="generate", metric="rougeL")) == []


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("classify", {"evaluation": {"max_new_tokens": 5}}, r"evaluation\.max_new_tokens: has no effect, because"),
        ("classify", {"evaluation": {"num_beams": 2}}, r"evaluation\.num_beams: has no effect"),
        ("generate", {"evaluation": {"length_normalized": False}}, r"evaluation\.length_normalized: has no effect"),
        ("classify", {"mixing": {"temperature": 3.0}}, r"mixing\.temperature: has no effect with mixing\.strategy"),
        ("classify", {"training": {"eval_steps": 5}}, r"training\.eval_steps: has no effect, because no task"),
        ("classify", {"training": {"scheduler": "constant", "warmup_steps": 5}}, r"set that to constant_with"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_named(tmp_path, kind, sections, message):
    rows = texts(*"abab") if kind == "classify" else asked(*"abab")
    config = recipe(tmp_path, rows, rows, kind=kind, sections=sections)
    with pytest.warns(DataWarning, match=message):
        warn_of_rows(load_tasks(config), config)


def test_max_new_tokens_of_a_ranked_task_has_no_effect(tmp_path):
    rows = asked(*"abab")
    task = {"kind": "generate", "mode": "rank", "options": ["a", "b"], "max_new_tokens": 4}
    [text] = found(recipe(tmp_path, rows, rows, **task))
    assert text == "task t: max_new_tokens has no effect with `rank`, which writes no text."


class Words:
    """A tokenizer of words."""

    bos_token_id, eos_token_id, eos_token, name_or_path = None, 0, "</s>", "words"

    def __call__(self, texts, **_):
        return {"input_ids": [[1] * len(text.split()) for text in texts]}


def lengths(config):
    datasets = {"train": encode_tasks(load_tasks(config), Words(), config.prompt)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert warn_of_lengths(datasets, config) == [str(one.message) for one in caught]
    return [str(one.message) for one in caught]


def test_a_cutoff_that_drops_or_cuts_a_quarter_of_the_rows(tmp_path):
    rows = [
        {"instruction": "w " * words, "output": "w " * answer}
        for words, answer in [(5, 2)] * 6 + [(40, 2), (4, 30)]
    ]
    template = {"prompt": {"template": "{instruction}", "cutoff": 20}}
    assert lengths(recipe(tmp_path, rows, kind="generate", sections=template)) == []  # one of eight each
    rows += [{"instruction": "w " * 40, "output": "w"}] * 2 + [{"instruction": "w", "output": "w " * 30}] * 2
    assert lengths(recipe(tmp_path, rows, kind="generate", sections=template)) == [
        "task t, train: prompt.cutoff=20 is too short for its 12 rows: 3 dropped (the answer alone is too long), 3 "
        "cut. 43 tokens fit 95% of the others, 43 all."
    ]


def test_a_cutoff_that_leaves_almost_no_prompt(tmp_path):
    rows = [{"instruction": "w " * 30, "output": "w " * 14}] * 2 + [{"instruction": "w", "output": "w"}] * 2
    [text] = lengths(
        recipe(
            tmp_path, rows, kind="generate", sections={"prompt": {"template": "{instruction}", "cutoff": 20}}
        )
    )
    assert "2 cut, 2 with almost nothing left of the prompt. 45 tokens fit 95% of them, 45 all." in text


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_a_cutoff_that_cuts_the_prompts_of_a_test(tmp_path, kind):
    """Of a task that is only tested as well; rows that `split` took from the training rows are counted there."""
    field, answer = ("text", "label") if kind == "classify" else ("instruction", "output")
    long, short = [{field: "w " * size, answer: "a"} for size in (40, 3)]
    sections = {"prompt": {"template": f"{{{field}}}", "cutoff": 20}}

    def prompts(train, test=(), **more):
        config = recipe(tmp_path, train, test, kind=kind, sections=sections | more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert warn_of_prompts(load_tasks(config), Words(), config) == [
                str(one.message) for one in caught
            ]
        return [str(one.message) for one in caught]

    assert prompts([short] * 8, [short] * 7 + [long]) == []
    assert prompts([short] * 8, [short] * 3 + [long]) == [
        "task t, test: prompt.cutoff=20 is too short for the prompts of its 4 rows: 1 cut. 40 tokens fit 95% of them, "
        "40 all."
    ]
    rows = [{field: f"{number} " * 40, answer: "a"} for number in range(8)]
    assert prompts(rows, split={"test": 0.5}) == []


def test_settings_that_other_sites_may_use_are_not_checked_at_a_site(tmp_path):
    config = recipe(tmp_path, texts(*"ab"), sections={"training": {"eval_steps": 5}})
    assert "training.eval_steps: has no effect" in found(config)[0]
    assert warn_of_rows(load_tasks(config), config, whole=False) == []


# ---- what a recipe cannot say


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metric": "rougeL"}, r"metric: rougeL compares texts word by word, and a `classify` task predicts a label"),
        ({"mode": "rank"}, r"mode: rank has no effect: a `classify` task is answered by its head"),
        ({"max_new_tokens": 3}, r"max_new_tokens: has no effect: a `classify` task writes no text"),
        ({"metric": "f1"}, r"positive: missing; `f1` is the F1 of one label"),
        ({"positive": "a"}, r"positive: has no effect with metric: accuracy; use f1"),
        ({"metric": "f1", "positive": "c", "options": ["a", "b"]}, r"positive: 'c' is not one of the options 'a', 'b'"),
        ({"class_weights": {"c": 2.0}, "options": ["a", "b"]}, r"class_weights: 'c' is not one of the options"),
        ({"class_weights": {"a": 0}}, r"greater than 0"),
        ({"kind": "generate", "class_weights": "balanced"}, r"class_weights: weighs the loss of a `classify` task"),
        ({"kind": "generate", "metric": "macro_f1"}, r"metric: macro_f1 needs a set of labels.*list them in `options`"),
        ({"test": {"limit": 3}}, r"tasks\.t\.test\.limit: has no effect.*hold rows out with split\.test=0\.1"),
        ({"test": {"where": {"a": 1}}}, r"test\.source: required, but missing"),
        ({"test": {"limit": 3, "where": {"a": 1}}}, r"test\.where: applies to a source, and `test` has none"),
        ({"train": {"limit": 3}}, r"train\.source: required, but missing"),
        ({"data": "flan8/snil"}, r"data: no dataset 'flan8/snil' in the catalog\. Did you mean flan8/snli"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_are_refused(task, message):
    section = {"name": "t", "kind": "classify", "train": "rows.jsonl", **task}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"tasks": [section]})


def test_a_label_that_the_rows_do_not_have_gets_no_weight(tmp_path):
    from braidlora.tasks import LabelSpace
    from braidlora.tasks.class_weights import class_weights

    config = recipe(tmp_path, texts(*"aab"), class_weights={"c": 2.0})
    tasks = load_tasks(config)
    with pytest.raises(ConfigError, match=r"tasks\.t\.class_weights: no label 'c'; the labels are 'a', 'b'"):
        class_weights(config, tasks, LabelSpace.of(tasks))


def test_ranking_in_a_recipe_of_classifiers_is_refused():
    tasks = [{"name": "t", "kind": "classify", "train": "rows.jsonl"}]
    with pytest.raises(
        ValueError, match=r"evaluation\.mode: rank has no effect: `classify` tasks are answered"
    ):
        RunConfig.model_validate({"tasks": tasks, "evaluation": {"mode": "rank"}})
