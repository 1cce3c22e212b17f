"""Whole evaluations with tiny models: contract, resume, and what may not be reused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
from evaluation_models import make_model, make_tokenizer

from braidlora.config import load_config
from braidlora.errors import ConfigError, DataError
from braidlora.evaluation import predict
from braidlora.evaluation.predictions import PredictionFile
from braidlora.evaluation.run import evaluate_tasks
from braidlora.tasks import LabelSpace, Task, encode_texts, get_template, load_tasks


@pytest.fixture
def asked(monkeypatch):
    """The number of prompts of every call of `predict.generate`."""
    counts = []
    real = predict.generate

    def counting(model, tokenizer, prompts, **options):
        counts.append(len(prompts))
        yield from real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(predict, "generate", counting)
    return counts


def run(recipe, directory, model=None, tokenizer=None, overrides=(), **options):
    config = load_config(recipe, overrides)
    model, tokenizer = model or make_model("llama"), tokenizer or make_tokenizer()
    return evaluate_tasks(model, tokenizer, load_tasks(config), config, directory, progress=False, **options)


def read(directory, task):
    text = (directory / "predictions" / f"{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_and_predictions_keep_their_contract(recipe, tmp_path):
    metrics = run(recipe, tmp_path / "out", overrides=["evaluation.references={sums: 50, text: 20}"])
    assert set(metrics) == {"tasks", "mean", "worst", "worst_task", "std", "delta_m"}
    assert {name: task["n"] for name, task in metrics["tasks"].items()} == {"sums": 11, "text": 5}
    assert metrics["tasks"]["sums"]["metric"] == "accuracy"
    assert metrics["tasks"]["text"]["metric"] == "rouge1"
    lines = read(tmp_path / "out", "sums")
    assert [line["index"] for line in lines] == list(range(11))
    assert set(lines[0]) == {"index", "prompt", "reference", "prediction", "extracted", "score"}
    assert lines[1]["prompt"] == "add please: 101?\n"
    assert lines[1]["reference"] == "1"
    assert sum(line["score"] for line in lines) / 11 == pytest.approx(metrics["tasks"]["sums"]["score"])
    assert metrics["tasks"]["sums"]["unparsed"] == sum(line["extracted"] is None for line in lines)
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_batch_size_changes_no_byte(recipe, tmp_path):
    results = [
        run(recipe, tmp_path / str(size), overrides=[f"evaluation.batch_size={size}"]) for size in (1, 32)
    ]
    assert results[0] == results[1]
    for task in ("sums", "text"):
        assert read(tmp_path / "1", task) == read(tmp_path / "32", task)


def test_a_cut_evaluation_answers_only_what_is_missing(recipe, tmp_path, asked):
    whole = run(recipe, tmp_path)
    path = tmp_path / "predictions" / "sums.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b'"index": 7') + 20])
    asked.clear()
    # Another batch size is no other evaluation: one may lower it when memory runs out.
    assert run(recipe, tmp_path, overrides=["evaluation.batch_size=3"]) == whole
    assert asked == [4, 0]
    assert path.read_bytes() == content
    asked.clear()
    assert run(recipe, tmp_path, resume=False) == whole
    assert asked == [11, 5]


KILLED = """
import os, signal, sys
from pathlib import Path
from evaluation_models import make_model, make_tokenizer
from braidlora.config import load_config
from braidlora.evaluation.predictions import PredictionFile
from braidlora.evaluation.run import evaluate_tasks
from braidlora.tasks import load_tasks
append, left = PredictionFile.append, [9]
def append_and_die(self, record):
    append(self, record)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
PredictionFile.append = append_and_die
config = load_config(sys.argv[1])
evaluate_tasks(make_model("llama"), make_tokenizer(), load_tasks(config), config, Path(sys.argv[2]), progress=False)
"""


def test_a_killed_evaluation_carries_on(recipe, tmp_path, asked):
    command = [sys.executable, "-c", KILLED, str(recipe), str(tmp_path / "killed")]
    environment = {  # the very braidlora that is tested here, which another checkout may not be
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(read(tmp_path / "killed", "sums")) == 9
    metrics = run(recipe, tmp_path / "killed")
    assert asked == [2, 5]
    assert metrics == run(recipe, tmp_path / "whole")
    assert read(tmp_path / "killed", "sums") == read(tmp_path / "whole", "sums")


def test_predictions_of_another_adapter_recipe_or_data_are_not_reused(recipe, tmp_path, asked):
    def again(model=None, overrides=()):
        asked.clear()
        run(recipe, tmp_path, model, overrides=overrides)
        return asked[0]

    base = make_model("llama")
    assert (again(base), again(base)) == (11, 0)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    assert (again(base), again(base)) == (11, 0)
    base.generation_config.eos_token_id = [2, 3]
    assert (again(base), again(base)) == (11, 0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    assert (again(adapted), again(adapted)) == (11, 0)
    with torch.no_grad():
        next(value for name, value in adapted.named_parameters() if "lora_B" in name)[-1, -1] += 0.5
    assert (again(adapted), again(adapted)) == (11, 0)
    with adapted.disable_adapter():
        assert (again(adapted), again(adapted)) == (11, 0)
    assert again(adapted) == 11
    for override in (
        "evaluation.num_beams=2",
        "evaluation.max_new_tokens=5",
        "prompt.template='{instruction}, {input}!'",
        "tasks.sums.extract=none",
        "tasks.sums.test.limit=7",
    ):
        assert (again(adapted, [override]), again(adapted, [override])) == (
            7 if "limit" in override else 11,
            0,
        )


def test_rank_mode_chooses_the_likelier_option(recipe, tmp_path, tokenizer):
    model = make_model("llama")
    metrics = run(
        recipe, tmp_path, model, overrides=["evaluation.mode=rank", "evaluation.length_normalized=false"]
    )
    assert metrics["tasks"]["sums"]["unparsed"] == 0
    for line in read(tmp_path, "sums"):
        prompt = tokenizer(line["prompt"])["input_ids"]
        values = {}
        for option in ("1", "23"):
            # What training taught to write for this answer, and the end token.
            ids = tokenizer(f"so {option}", add_special_tokens=False)["input_ids"] + [2]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            values[option] = sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids))
        assert line["prediction"] == max(values, key=values.get)


def test_rank_needs_options(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"`rank`.*text has none"):
        run(recipe, tmp_path, overrides=["evaluation.mode=rank", "tasks.text.options=null"])


def test_prompts_leave_room_for_the_answer(recipe, tmp_path):
    # The model has 96 positions; GPT-2 would fail beyond them.
    long = "prompt.template='" + "x" * 200 + "{instruction}{input}'"
    run(
        recipe,
        tmp_path,
        make_model("gpt2"),
        overrides=[long, "prompt.cutoff=500", "evaluation.max_new_tokens=20"],
    )
    with pytest.raises(ConfigError, match="96 positions"):
        run(recipe, tmp_path, overrides=["evaluation.max_new_tokens=96"])


def test_a_tasks_own_max_new_tokens_counts(recipe, tmp_path, tokenizer):
    run(recipe, tmp_path, overrides=["tasks.text.max_new_tokens=2"])
    assert max(len(line["prediction"]) for line in read(tmp_path, "text")) <= 2
    assert max(len(line["prediction"]) for line in read(tmp_path, "sums")) > 2


def test_tasks_without_test_rows_are_named_not_scored(recipe, tmp_path):
    metrics = run(recipe, tmp_path, overrides=["tasks.text.test=null"])
    assert list(metrics["tasks"]) == ["sums"]
    assert metrics["without_test_rows"] == ["text"]
    nothing = run(recipe, tmp_path, overrides=["tasks.*.test=null"])
    assert nothing["tasks"] == {}
    assert nothing["mean"] is nothing["worst"] is nothing["std"] is None


def test_a_reference_without_an_answer_stops_before_any_row(recipe, tmp_path, asked):
    with pytest.raises(DataError, match="task text, test row 0"):
        run(recipe, tmp_path, overrides=["tasks.text.extract=boolq"])
    assert asked == []


def classify_tasks() -> list[Task]:
    template = get_template("alpaca", "classify")
    labels = {"mood": ["good", "bad"], "kind": ["bird", "bad", "fish"]}
    return [
        Task(
            name, "classify", template, [], [],
            [{"text": "word " * (i % 5) + name, "label": own[i % len(own)]} for i in range(13)],
            metric="accuracy", labels=own,
        )
        for name, own in labels.items()
    ]  # fmt: skip


def test_classification_stays_within_the_tasks_own_labels(recipe, tmp_path):
    tasks, tokenizer = classify_tasks(), make_tokenizer(encoder=True)
    space = LabelSpace.of(tasks)
    assert space.names == ["good", "bad", "bird", "fish"]
    model = make_model("bert", num_labels=4)
    config = load_config(recipe, ["tasks.*.kind=classify", "tasks.*.extract=none", "tasks.*.metric=accuracy"])
    metrics = evaluate_tasks(model, tokenizer, tasks, config, tmp_path, label_space=space, progress=False)
    for task in tasks:
        lines = read(tmp_path, task.name)
        assert {line["prediction"] for line in lines} <= set(task.labels)
        for line, row in zip(lines, task.test, strict=True):
            ids = encode_texts([row], task.template, tokenizer, 64)[0].input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            best = max(task.labels, key=lambda label: float(logits[space.index(label)]))
            assert line["prediction"] == best
        right = sum(line["prediction"] == row["label"] for line, row in zip(lines, task.test, strict=True))
        found = dict(metrics["tasks"][task.name])
        assert 0 <= found.pop("macro_f1") <= 100
        accuracy = pytest.approx(100 * right / 13)
        assert found == {"metric": "accuracy", "score": accuracy, "n": 13, "accuracy": accuracy}


def test_labels_and_tasks_that_the_classifier_does_not_know_are_refused(recipe, tmp_path):
    tasks, tokenizer, model = classify_tasks(), make_tokenizer(encoder=True), make_model("bert")
    config = load_config(recipe, ["tasks.*.kind=classify", "tasks.*.extract=none", "tasks.*.metric=accuracy"])
    other = LabelSpace({"mood": ["good", "ugly"], "kind": ["bird", "bad", "fish"]})
    with pytest.raises(DataError, match=r"label bad, which the classifier lacks.*good, ugly"):
        evaluate_tasks(model, tokenizer, tasks, config, tmp_path, label_space=other, progress=False)
    other = LabelSpace({"mood": ["good", "bad"]})
    with pytest.raises(ConfigError, match=r"task kind.*not trained on it; its tasks are mood"):
        evaluate_tasks(model, tokenizer, tasks, config, tmp_path, label_space=other, progress=False)
    wrong = [replace(tasks[0], metric="f1", positive="Bad"), tasks[1]]
    with pytest.raises(
        ConfigError, match=r"tasks.mood.positive: 'Bad' is not one of the task's labels .*'bad'"
    ):
        evaluate_tasks(model, tokenizer, wrong, config, tmp_path, progress=False)
    assert not (tmp_path / "predictions").exists()


def test_progress_goes_to_stderr(recipe, tmp_path, capsys):
    config = load_config(recipe)
    evaluate_tasks(make_model("llama"), make_tokenizer(), load_tasks(config), config, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "16/16" in captured.err or "evaluate" in captured.err


def test_the_file_is_complete_before_it_counts(tmp_path):
    file = PredictionFile(tmp_path, "t", {}, 2)
    with pytest.raises(AssertionError, match="have no prediction"):
        file.finish()
