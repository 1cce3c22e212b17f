"""The real datasets, read in place, and every shipped recipe that reads them."""

from __future__ import annotations

from collections import Counter

import pytest

from braidlora import catalog
from braidlora.config import RunConfig, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.tasks import IGNORED, LabelSpace, data_report, encode_prompt, encode_tasks, load_tasks
from helpers.data import data_path

FLAN = {
    "definite_pronoun_resolution": None,
    "snli": {"yes": 100, "no": 100, "it is not possible to tell": 100},
    "cola": {"acceptable": 150, "unacceptable": 150},
    "glue_qqp": {"yes": 150, "no": 150},
    "trec": {"description": 50, "entity": 50, "abbreviation": 50, "human": 50, "numeric": 50, "location": 50},
    "web_nlg_en": None,
    "fix_punct": None,
    "wic": {"different meanings": 150, "the same meaning": 150},
}
SENTENCES = {
    "sst2": (6917, 1821, 2),
    "sst5": (8541, 2210, 5),
    "subj": (9000, 1000, 2),
    "trec": (5442, 500, 6),
    "cr": (3065, 700, 2),  # two of its 3,067 training rows have no text
    "mpqa": (7338, 1000, 2),  # two of 7,340
}
COMMONSENSE = {
    "boolq": (9427, 3270),
    "ARC-Easy": (2251, 2376),
    "ARC-Challenge": (1119, 1172),
    "openbookqa": (4957, 500),
}
MATH_TESTS = {
    "gsm8k": 1319, "AQuA": 254, "SVAMP": 1000, "mawps": 238, "mathqa": 2985, "AddSub": 395, "MultiArith": 600,
    "SingleEq": 508,
}  # fmt: skip


def test_flan8_has_eight_tasks_with_no_test_prompt_in_training(stories_tokenizer):
    data_path("data", "fed", "dataset1")
    config = load_config("flan8")
    tasks = load_tasks(config)
    assert [task.name for task in tasks] == list(FLAN)
    for task in tasks:
        assert (len(task.train), len(task.test), task.metric) == (300, 200, "rouge1")
        if FLAN[task.name]:
            assert Counter(row["output"] for row in task.train) == FLAN[task.name]
    train = encode_tasks(tasks, stories_tokenizer, config.prompt)
    report = data_report(tasks, {"train": train})
    for name in FLAN:
        parts = report["tasks"][name]
        assert parts["test"]["in_train"] == 0
        assert parts["test"]["filtered"] == 1400
        encoded = parts["train"]["encoded"]
        assert encoded["rows"] + encoded["dropped"] == 300
        assert encoded["longest"] <= config.prompt.cutoff
    for index in range(0, len(train), 97):
        item = train[index]
        assert item["input_ids"][-1] == item["labels"][-1] == stories_tokenizer.eos_token_id
        assert item["labels"][0] == IGNORED
    row, template = tasks[3].test[0], tasks[3].template
    prompt = stories_tokenizer.decode(encode_prompt(row, template, stories_tokenizer, 320))
    assert prompt.endswith(row["instruction"][-20:] + "\n")


def test_an_unknown_flan_task_is_answered_with_the_known_ones():
    path = data_path("data", "fed", "dataset1", "flan_test_200_selected_nstrict_1.jsonl")
    task = {"name": "snli", "test": {"source": str(path), "where": {"task": "snil"}}}
    with pytest.raises(
        DataError, match=r"the values of 'task' are cola, definite_pronoun_resolution, fix_punct"
    ):
        load_tasks(RunConfig.model_validate({"tasks": [task]}))


def test_a_condition_that_the_data_set_has_itself_is_refused():
    data_path("data", "fed")
    with pytest.raises(
        ConfigError, match=r"tasks\.snli\.test\.where\.task: data:flan8/snli is the rows with"
    ):
        load_tasks(load_config("flan8", ["tasks.snli.test.where.task=snil"]))


def test_commonsense_in_full():
    data_path("data", "commonsense")
    overrides = ["tasks.*.train.limit=null", "tasks.*.test.limit=null"]
    tasks = load_tasks(load_config("commonsense4", overrides))
    assert {task.name: (len(task.train), len(task.test)) for task in tasks} == COMMONSENSE
    for task in tasks:
        assert (task.metric, task.extract) == ("accuracy", task.name)
        answer = task.test[0]["answer"]
        assert task.test[0]["output"] == f"the correct answer is {answer}"
    assert data_report(tasks)["tasks"]["ARC-Easy"]["test"]["in_train"] == 2


@pytest.mark.parametrize("name", MATH_TESTS)
def test_math_test_sets(name):
    path = data_path("data", "math", name, "test.json")
    task = load_tasks(RunConfig.model_validate({"tasks": [{"name": name, "test": str(path)}]}))[0]
    assert len(task.test) == MATH_TESTS[name]
    assert all(row["answer"] for row in task.test)


def test_math_recipe_trains_on_two_tasks_and_tests_a_third():
    data_path("data", "math")
    tasks = load_tasks(load_config("math"))
    assert [(task.name, len(task.train), len(task.test)) for task in tasks] == [
        ("gsm8k", 400, 50), ("mawps", 400, 50), ("SVAMP", 0, 50),
    ]  # fmt: skip


def test_original_gsm8k_with_other_column_names():
    path = data_path("data", "math", "gsm8k", "original_train.jsonl")
    task = {"name": "gsm8k", "train": str(path), "columns": {"instruction": "question", "output": "answer"}}
    rows = load_tasks(RunConfig.model_validate({"tasks": [task]}))[0].train
    assert len(rows) == 7473
    assert rows[0]["output"].endswith("#### 72")


def test_sentences_in_full_share_one_label_space():
    data_path("data", "sentences")
    tasks = load_tasks(load_config("sentences6", ["tasks.*.train.limit=null"]))
    found = {task.name: (len(task.train), len(task.test), len(task.labels or [])) for task in tasks}
    assert found == SENTENCES
    space = LabelSpace.of(tasks)
    assert len(space.names) == 5 + 2 + 6  # sst5's five grades hold the two of sst2, cr and mpqa
    assert space.mask.sum(1).tolist() == [2, 5, 2, 6, 2, 2]
    skipped = {task.name: task.counts["train"].skipped for task in tasks}
    assert {name: count for name, count in skipped.items() if count} == {"cr": 2, "mpqa": 2}


def test_sentences6_reads_800_rows_a_task_and_all_test_rows():
    data_path("data", "sentences")
    config = load_config("sentences6")
    assert [len(task.train) for task in load_tasks(config)] == [800] * 6
    training = config.training
    assert training.batch_size * training.gradient_accumulation == 32
    assert (training.epochs, training.learning_rate) == (3.0, 2e-3)


@pytest.mark.parametrize(
    "name",
    [
        "paper/commonsense_llama3_8b",
        "paper/commonsense_qwen2_7b",
        "paper/math_llama3_8b",
        "paper/flan_llama2_7b",
    ],
)
def test_paper_recipes_have_the_papers_settings_and_read_its_files(name):
    data_path("data", "fed")
    config = load_config(name)
    adapter, training, prompt = config.adapter, config.training, config.prompt
    assert (adapter.method, adapter.num_experts, adapter.r, adapter.lora_alpha) == ("alora", 3, 8, 16.0)
    assert adapter.lora_dropout == 0.05
    assert adapter.target_modules == (["q_proj", "v_proj"] if "llama2" in name else ["q_proj", "o_proj"])
    assert (training.learning_rate, training.warmup_steps, training.batch_size) == (3e-4, 100, 16)
    assert training.epochs == (50.0 if "flan" in name else 3.0)
    assert (prompt.cutoff, prompt.train_on_prompt) == (256, True)
    new_tokens = {"commonsense": 32, "math": 256, "flan": 80}[name.split("/")[1].split("_")[0]]
    assert (config.evaluation.num_beams, config.evaluation.max_new_tokens) == (4, new_tokens)
    read = 0
    for task in config.model_dump()["tasks"]:
        for part in ("train", "test"):
            if task[part] is None:
                continue
            key = task[part]["source"].removeprefix(catalog.PREFIX)
            if catalog.find(catalog.data_file(catalog.data_set(key).parts[part].file)) is None:
                continue  # not all of these sets are here
            only = {"name": task["name"], part: task[part]}
            assert load_tasks(RunConfig.model_validate({"tasks": [only]}))[0].rows(part)
            read += 1
    assert read >= 4
