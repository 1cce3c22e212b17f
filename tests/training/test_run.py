"""A whole run: what stands in its directory, and that it can be used from there."""

import json
import os
import re
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from braidlora.config import dump_config, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.models.adapter_reader import open_adapter, restore_adapter
from braidlora.models.attach import attach_adapter
from braidlora.models.base import load_base
from braidlora.one_run import train
from braidlora.runs import Committed
from helpers.results import run_bytes


def run(config, **options):
    return train(config, progress=False, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return {}


@pytest.fixture
def result(done, make_config, tmp_path_factory):
    if not done:
        config = make_config(str(tmp_path_factory.mktemp("done") / "run"), split__validation=0.1)
        done["config"], done["result"] = config, run(config)
    return done["config"], done["result"]


def test_the_run_directory(result):
    _, done = result
    assert {path.name for path in done.directory.iterdir()} == {
        "adapter", "adapter_init", "checkpoints", "config.yaml", "data.json", "environment.json", "log.jsonl",
        "manifest.json", "metrics.json", "predictions",
    }  # fmt: skip
    for folder in (
        "adapter",
        "adapter_init",
        *(f"checkpoints/{p.name}" for p in done.directory.glob("checkpoints/*")),
    ):
        Committed(done.directory / folder).verify()
    assert {path.name for path in (done.directory / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json",
    }  # fmt: skip
    assert not list(done.directory.rglob("*.bin"))


def test_metrics(result):
    _, done = result
    metrics = json.loads((done.directory / "metrics.json").read_text())
    assert metrics == done.metrics
    assert {"tasks", "mean", "worst", "std", "delta_m", "seconds", "trainable_parameters"} <= set(metrics)
    assert set(metrics["tasks"]["up"]) >= {"metric", "score", "n"}
    data = json.loads((done.directory / "data.json").read_text())["tasks"]
    timing = metrics["timing"]
    assert timing["tokens"] == 2 * sum(task["train"]["encoded"]["tokens"] for task in data.values())
    assert timing["tokens_per_second"] == pytest.approx(
        timing["tokens"] / timing["training_seconds"], rel=0.01
    )
    assert metrics["seconds"] == pytest.approx(
        timing["training_seconds"] + timing["evaluation_seconds"], abs=0.01
    )
    # q_proj (64 → 64) and v_proj (64 → 32) of two layers: 2 A of rank 4, a router of 2 rows, one B.
    assert metrics["trainable_parameters"] == 2 * ((8 + 2) * 64 + 64 * 4 + (8 + 2) * 64 + 32 * 4)


def test_the_log(result):
    config, done = result
    lines = [json.loads(line) for line in (done.directory / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12, 15, 16]
    assert [line["step"] for line in validation] == [8, 16]  # once an epoch
    for line in training:
        assert set(line) == {"step", "epoch", "loss", "tasks", "learning_rate", "grad_norm", "timing"}
        assert set(line["tasks"]) <= {"up", "rev", "len"}
        low, high = min(line["tasks"].values()), max(line["tasks"].values())
        assert low <= line["loss"] <= high
    for line in validation:
        assert line["validation_loss"] == pytest.approx(sum(line["validation_tasks"].values()) / 3)
    assert training[0]["learning_rate"] == pytest.approx(config.training.learning_rate)


def test_the_last_step_is_validated_wherever_it_falls(make_config, tmp_path):
    run(make_config(split__validation=0.1, training__max_steps=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3]


def test_scoring_can_wait(make_config, tmp_path):
    config = make_config(training__epochs=1)
    assert run(config, evaluate=False).metrics == {}
    assert not (tmp_path / "run" / "predictions").exists()
    later = run(config, resume="auto")
    at_once = run(make_config("at_once", training__epochs=1))
    clock = {"seconds": 0, "timing": {}}
    assert {**later.metrics, **clock} == {**at_once.metrics, **clock}
    assert run_bytes(tmp_path / "run") == run_bytes(tmp_path / "at_once")


def test_records(result):
    config, done = result
    assert load_config(done.directory / "config.yaml") == config
    environment = json.loads((done.directory / "environment.json").read_text())
    assert environment["threads"] == torch.get_num_threads()
    assert environment["versions"]["peft"] == peft.__version__
    data = json.loads((done.directory / "data.json").read_text())
    assert data["tasks"]["rev"]["train"]["encoded"]["rows"] > 0


def test_step_zero_is_the_base(result):
    config, done = result
    base, tokenizer = load_base(config.model)
    batch = tokenizer("up:abc->", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = base(**batch).logits
        model = attach_adapter(base, config, seed=77)
        restore_adapter(model, open_adapter(done.directory / "adapter_init"))
        assert torch.equal(model.eval()(**batch).logits, expected)
        restore_adapter(model, open_adapter(done.directory / "adapter"))
        assert not torch.equal(model(**batch).logits, expected)


def test_pefts_own_loader_gives_the_trained_model(result):
    config, done = result
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model.path), done.directory / "adapter"
    )
    base, tokenizer = load_base(config.model)
    ours = attach_adapter(base, config, seed=0)
    restore_adapter(ours, open_adapter(done.directory / "adapter"))
    batch = tokenizer("rev:abc->", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, ours.eval()(**batch).logits)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(done.directory / "adapter")
    with torch.no_grad():
        assert torch.equal(automatic.eval()(**batch).logits, ours(**batch).logits)


def test_a_checkpoint_is_an_adapter_too(result):
    config, done = result
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    peft.PeftModel.from_pretrained(base, done.directory / "checkpoints" / "step-16")


def test_classification_saves_labels_and_head(make_config, tmp_path):
    done = run(make_config(kind="classify", training__epochs=1))
    assert json.loads((tmp_path / "run" / "labels.json").read_text())["tasks"]["up"] == ["no", "yes"]
    from safetensors.torch import load_file

    saved = load_file(done.directory / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape == (6, 64)  # yes, no, and four lengths
    assert set(done.metrics["tasks"]) == {"up", "rev", "len"}


def test_seeds_differ_and_repeat(make_config, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(make_config(name, seed=seed, training__epochs=1))
    assert run_bytes(tmp_path / "one") == run_bytes(tmp_path / "again")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() != (tmp_path / "two" / weights).read_bytes()


def test_threads_are_set_for_the_run_alone(make_config, tmp_path):
    before = torch.get_num_threads()
    run(make_config(training__threads=2, training__max_steps=1, training__warmup_steps=0))
    assert torch.get_num_threads() == before
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 2


def test_the_cache_is_on_again(make_config):
    from braidlora import one_run

    seen = {}
    evaluate = one_run.evaluate_tasks

    def looking(model, *args, **kwargs):
        seen["cache"] = model.config.use_cache
        return evaluate(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_run, "evaluate_tasks", looking)
        run(make_config(training__max_steps=3))
    assert seen["cache"] is True


def test_no_training_rows(make_config):
    config = make_config()
    tasks = [task.model_copy(update={"train": None, "test": task.train}) for task in config.tasks]
    with pytest.raises(DataError, match="no task has training rows"):
        run(config.model_copy(update={"tasks": tasks}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation__mode": "rank"}, r"`rank` chooses among a task's options, but up, rev, len has none"),
        ({"evaluation__max_new_tokens": 64}, "task up: answers of 64 tokens leave no room for a prompt"),
        (
            {"extract": "boolq"},
            "task up, test row 0: the reference .* contains no answer under `extract: boolq`",
        ),
        ({"prompt__cutoff": 65}, r"prompt\.cutoff: 65 tokens, but .*base.* has 64 positions"),
    ],
)
def test_what_the_evaluation_cannot_do_stops_before_training(make_config, tmp_path, change, message):
    task = {"max_new_tokens": None, **{key: value for key, value in change.items() if "__" not in key}}
    config = make_config(**{key: value for key, value in change.items() if "__" in key})
    tasks = [section.model_copy(update=task) for section in config.tasks]
    with pytest.raises((ConfigError, DataError), match=message):
        run(config.model_copy(update={"tasks": tasks}))
    assert not (tmp_path / "run").exists()


def test_the_bar_is_one_line(make_config, capfd):
    train(make_config(split__validation=0.1), progress=True)
    said = capfd.readouterr().err
    last = re.split(r"[\r\n]+", said.strip())
    shown = [line for line in last if line.startswith("train")]
    assert re.search(r"train 100%\|█+\| 16/16 \[\S+<\S+\], epoch=2\.00", shown[-1])
    assert any(re.search(r"loss=\d+\.\d{4}", line) for line in shown)


def test_the_command_gives_the_same_bytes_under_another_hash_seed(make_config, in_child, tmp_path):
    config = make_config("forked", adapter__target_modules="all-linear")
    assert in_child(config).code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "braidlora",
            "train",
            str(recipe),
            f"--output={tmp_path / 'command'}",
            "--json",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(tmp_path / "command")
    assert run_bytes(tmp_path / "command") == run_bytes(tmp_path / "forked")
