"""Recipes: places, overrides, and every problem at once."""

import re
from pathlib import Path

import pytest

from braidlora.config import (
    RunConfig,
    built_in_recipes,
    dump_config,
    find_recipe,
    load_config,
    override_config,
    schema_of,
)
from braidlora.errors import ConfigError

MINIMAL = "tasks:\n  - {name: a, train: a.jsonl}\n  - {name: b, train: {source: b.jsonl}}\n"


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_plain_string_is_a_source(recipe):
    config = load_config(recipe())
    assert config.tasks[0].train.source == "a.jsonl"
    assert config.tasks[1].train.source == "b.jsonl"


def test_the_dump_of_a_configuration_loads_as_the_same_configuration(recipe, tmp_path):
    config = load_config(recipe(), ["--training.learning_rate=1e-5", "--adapter.method=hydralora"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def test_all_problems_are_reported_at_once_with_file_and_line(recipe):
    path = recipe(
        "training:\n  learnin_rate: 1e-4\n  epochs: -1\nadapter:\n  num_experts: 0\n  lora_dropout: 1.0\n  r: 0\n"
        "  lora_alpha: 0\n" + MINIMAL
    )
    text = problems(path)
    assert "6 problems" in text
    assert f"{path}:2: training.learnin_rate: unknown key; did you mean `learning_rate`?" in text
    assert f"{path}:3: training.epochs: got -1" in text
    assert f"{path}:5: adapter.num_experts: got 0" in text
    assert f"{path}:6: adapter.lora_dropout: got 1.0; expected less than 1" in text
    assert f"{path}:7: adapter.r: got 0" in text
    assert f"{path}:8: adapter.lora_alpha: got 0; expected more than 0" in text


@pytest.mark.parametrize("value", [".nan", ".inf", "nan", "0", "-1e-4", "fast"])
def test_a_learning_rate_is_a_finite_positive_number(recipe, value):
    assert "training.learning_rate" in problems(recipe(), f"training.learning_rate={value}")


def test_a_key_given_twice_is_refused_with_both_lines(recipe):
    path = recipe("seed: 1\nseed: 2\n" + MINIMAL)
    assert f"{path}:2: seed: duplicate key (first on line 1)" in problems(path)


def test_no_tasks_are_refused(recipe):
    assert "tasks" in problems(recipe("tasks: []\n"))
    assert "tasks: required" in problems(recipe("seed: 1\n"))


def test_python_tags_are_refused_and_nothing_runs(recipe, tmp_path):
    mark = tmp_path / "ran"
    path = recipe(f"tasks: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    assert "Python tags could run code" in problems(path)
    assert not mark.exists()


def test_model_code_is_refused(recipe):
    assert "never runs code from a model repository" in problems(recipe(), "model.trust_remote_code=true")


def test_words_such_as_no_stay_words_and_rates_without_a_dot_are_numbers(recipe):
    path = recipe("tasks:\n  - {name: a, train: {source: a.csv, where: {answer: no}}, options: [yes, no]}\n")
    config = load_config(path, ["training.learning_rate=3e-4"])
    assert config.tasks[0].train.where == {"answer": "no"}
    assert config.tasks[0].options == ["yes", "no"]
    assert config.training.learning_rate == 3e-4


def test_overrides_reach_list_items_by_index_name_and_star(recipe):
    overrides = ["tasks.*.train.limit=7", "tasks.1.kind=generate", "tasks.b.metric=rouge1"]
    config = load_config(recipe(), overrides)
    assert [task.train.limit for task in config.tasks] == [7, 7]
    assert [task.metric for task in config.tasks] == [None, "rouge1"]


def test_an_override_of_an_unknown_task_lists_the_known_ones(recipe):
    assert "the items are a, b" in problems(recipe(), "tasks.c.train.limit=1")


def test_a_bad_override_is_named_as_the_override(recipe):
    assert "override --adapter.r: got 0" in problems(recipe(), "adapter.r=0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixing.weights={c: 1}", "unknown task c"),
        ("mixing.strategy=weights", "no weight for a, b"),
        (
            "mixing.weights={a: 3, b: 1}",
            "mixing.weights has no effect with mixing.strategy: proportional",
        ),
        ("evaluation.references={z: 50}", "unknown task z"),
        ("training.load_best=true", "needs validation rows"),
        ("tasks.a.kind=classify", "need different models"),
        ("tasks.a.name=b", "duplicate task names: b"),
        ("tasks.a.name=../x", "tasks.0.name"),
        ("split={validation: 0.6, test: 0.5}", "to leave training rows"),
    ],
)
def test_sections_must_agree(recipe, override, message):
    assert message in problems(recipe(), override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.method=lora2", "adapter.method: got 'lora2'; expected 'alora', .* or a section with keys."),
        ("adapter.target_modules=5", "adapter.target_modules: got 5; expected a text, or a list."),
        ("adapter.target_modules=[5, q]", r"adapter.target_modules: got .*5.*expected a text, or a list of texts"),
        ("tasks.a.columns={foo: bar}", "tasks.0.columns.foo: got 'foo'; expected 'instruction', "),
    ],
)  # fmt: skip
def test_a_value_of_no_allowed_type_is_one_problem_named_by_its_key(recipe, override, said):
    text = problems(recipe(), override)
    assert text.startswith("1 problem in the recipe")
    assert re.search(rf"override --([a-z._]+: )?{said}", text)


def test_a_checked_configuration_takes_other_values(recipe):
    config = load_config(recipe())
    changed = override_config(
        config,
        {
            "adapter.r": 4,
            "adapter.method": {"peft_type": "LOHA"},
            "tasks.*.train.limit": 7,
            "tasks.b.metric": "rouge1",
        },
    )
    assert (changed.adapter.r, changed.adapter.method) == (4, {"peft_type": "LOHA"})
    assert [(task.train.limit, task.metric) for task in changed.tasks] == [(7, None), (7, "rouge1")]
    assert (config.adapter.r, config.tasks[0].train.limit) == (8, None)
    assert override_config(config, {}) == config
    with pytest.raises(
        ConfigError, match=r"2 problems.*\n.*override --adapter\.r: .*got 0(.|\n)*unknown key"
    ) as caught:
        override_config(config, {"adapter.r": 0, "training.rate": 1})
    assert caught.value.exit_code == 2


def test_a_missing_recipe_is_first_of_all_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.yaml").write_text(MINIMAL)

    def said(recipe):
        with pytest.raises(ConfigError) as caught:
            find_recipe(recipe)
        assert caught.value.exit_code == 2
        return str(caught.value)

    here = f"no such file in {tmp_path}"
    assert said("tickts.yaml") == f"tickts.yaml: {here}. Did you mean tickets.yaml?"
    assert said(tmp_path / "ticket.yml").endswith(f"Did you mean {tmp_path / 'tickets.yaml'}?")
    assert "flan8" not in (text := said("missing.yaml"))
    assert text.startswith(f"missing.yaml: {here}. `braidlora recipes` lists")
    assert said("flna8").endswith(
        "no built-in recipe of this name. Did you mean the built-in recipe `flan8`?"
    )
    assert "there is no folder" in said("nowhere/missing.yaml")
    assert "write --key=value" in said("0.5")


def test_a_value_of_the_wrong_kind_is_told_once_and_in_plain_words(recipe):
    start = "1 problem in the recipe:\n  override --training."
    for override, said in {
        "batch_size=vier": "batch_size: got 'vier'; expected a whole number.",
        "batch_size=1.5": "batch_size: got 1.5; expected a whole number.",
        "batch_size=0": "batch_size: got 0; expected at least 1.",
        "learning_rate=fast": "learning_rate: got 'fast'; expected a number.",
        "gradient_checkpointing=maybe": "gradient_checkpointing: got 'maybe'; expected true or false.",
    }.items():
        assert problems(recipe(), f"training.{override}") == start + said


def test_two_fields_of_one_column_are_refused(recipe):
    said = problems(recipe(), "tasks.a.columns={instruction: x, input: x}")
    assert "columns: `instruction` and `input` are both read from the column 'x'" in said
    load_config(recipe(), ["tasks.a.columns={output: x, answer: x}"])


@pytest.mark.parametrize("name", built_in_recipes())
def test_every_built_in_recipe_parses_and_says_how_to_run_it(name):
    path = built_in_recipes()[name]
    schema = schema_of(name)
    assert isinstance(load_config(name, [], schema), RunConfig)
    verb = "train" if schema is RunConfig else "federate"
    first_lines = path.read_text(encoding="utf-8").splitlines()[:6]
    assert all(line.startswith("#") for line in first_lines[:2])
    assert any(f"braidlora {verb} {name}" in line or "braidlora demo" in line for line in first_lines), (
        f"{name}: the first comment lines must give the command that runs the recipe"
    )


def test_an_override_of_all_tasks_rows_that_reaches_none_says_so():
    with pytest.raises(
        ConfigError,
        match=r"override --tasks\.\*\.validation\.limit: no task .* has `validation` rows, .*split\.validation=0\.1",
    ):
        load_config("demo", ["tasks.*.validation.limit=5"])


def test_an_override_below_a_key_that_is_not_there_is_told_by_its_own_name():
    with pytest.raises(ConfigError, match=r"override --seed\.x: seed: got"):
        load_config("demo", ["seed.x=1"])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("commonsense4", "commonsense4_smollm2"),
        ("fed_flan8", "fed_flan8_smollm2"),
        ("fed_flan8_het", "fed_flan8_smollm2_het"),
        ("flan8", "flan8_smollm2"),
    ],
)
def test_names_of_recipes_that_say_the_base(name, other):
    assert find_recipe(other) == built_in_recipes()[name]
