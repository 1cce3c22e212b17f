"""Runs whose experts are weighted by task, or aligned between tasks: from the recipe to the exported LoRA."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import braidlora
from braidlora.adapters import for_tasks
from braidlora.cli import main
from braidlora.config import AdapterSection
from braidlora.errors import ConfigError
from braidlora.evaluation.predict import generate
from braidlora.models.adapter_config import build_adapter_config, setting_of
from braidlora.tasks import encode_prompt
from braidlora.training.trainer import MultiTaskTrainer
from helpers.recipes import training_recipe

TASKS = ["up", "rev", "len"]  # as the recipe lists them


def train(base, rows, folder, **options):
    recipe = training_recipe(base, rows, folder / "run", **options)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(path)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny_base, rows, tmp_path_factory):
    return train(tiny_base, rows, tmp_path_factory.mktemp("mtl"), adapter__method="mtl-lora")


def test_the_adapter_says_what_it_is(run):
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert {key: config[key] for key in ("share", "gate", "task_map", "task_names", "num_experts")} == {
        "share": "A", "gate": "task", "task_map": True, "task_names": TASKS, "num_experts": 2,
    }  # fmt: skip
    card = json.loads((run / "adapter/braidlora.json").read_text())
    assert [task["name"] for task in card["tasks"]] == TASKS
    assert "Σᵢ w_tᵢ Bᵢ Λ_t A x" in (run / "adapter/README.md").read_text(encoding="utf-8")


def test_gradient_checkpointing_changes_nothing(run, tiny_base, rows, tmp_path):
    """What runs again in backward has the tasks of its own rows, over accumulated batches too."""
    options = {
        "adapter__method": "mtl-lora", "adapter__lora_dropout": 0.0, "training__max_steps": 3,
        "training__batch_size": 4, "training__warmup_steps": 0, "training__gradient_accumulation": 2,
    }  # fmt: skip
    states = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        folder = tmp_path / name
        folder.mkdir()
        found = train(tiny_base, rows, folder, **options, training__gradient_checkpointing=checkpointing)
        states.append(load_file(found / "adapter/adapter_model.safetensors"))
    assert any("braidlora_map" in name for name in states[0])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_resumed_run_ends_in_the_same_bytes(run, tiny_base, rows, tmp_path):
    recipe = training_recipe(tiny_base, rows, tmp_path / "run", adapter__method="mtl-lora")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    steps = []
    step = MultiTaskTrainer.training_step

    def stop_at_five(trainer, *args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "training_step", stop_at_five)
        assert main(["train", str(path)]) != 0
    assert main(["train", str(path), "--resume", "auto"]) == 0
    saved = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / saved).read_bytes() == (run / saved).read_bytes()


def test_predict_and_generate_choose_the_gate_of_the_task(run, tmp_path, capsys):
    """`predict --task`, `generate` and Python's calls against the network itself under each task's weights."""
    model = braidlora.load(str(run))
    inputs = ["abc", "fed", "aab"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": "up", "input": text}) + "\n" for text in inputs))
    rows = [{"instruction": "up", "input": text} for text in inputs]
    found = {}
    for task in TASKS:
        template = model.task(task).template
        prompts = [encode_prompt(row, template, model.tokenizer, 24) for row in rows]
        with for_tasks(task):
            wanted = dict(generate(model.network, model.tokenizer, prompts, max_new_tokens=4))
        found[task] = [wanted[i] for i in range(3)]
        assert [one["prediction"] for one in model.predict(rows, task)] == found[task]
        assert model.generate(rows, task=task, max_new_tokens=4) == found[task]
        capsys.readouterr()
        assert main(["predict", str(run), f"--file={file}", f"--task={task}"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prediction"] for line in lines] == found[task]
    tokens = torch.arange(4, 24)[None]
    seen = []
    for task in TASKS[:2]:
        with for_tasks(task), torch.no_grad():
            seen.append(model.network(tokens).logits)
    assert not torch.equal(*seen), "tasks differ"
    with pytest.raises(
        ConfigError, match=r"--task: .*weights its experts by task; choose one of up, rev, len"
    ):
        model.generate("abc")


def test_each_task_is_exported_as_the_lora_that_it_is(run, tiny_base, tmp_path, capsys):
    """Plain PEFT, without braidlora's layer, gives the logits that the run gives for the task."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(4, 24)[None]
    model = braidlora.load(str(run)).network
    assert main(["export", str(run)]) == 2
    assert "one of up, rev, len" in capsys.readouterr().err
    assert main(["export", str(run), "--static-weights=task=nope"]) == 2
    capsys.readouterr()
    results = []
    for task in TASKS:
        folder = tmp_path / task
        assert main(["export", str(run), f"--static-weights=task={task}", f"--output={folder}"]) == 0
        record = json.loads((folder / "export.json").read_text())
        assert record["exact"] is True
        assert record["task"] == task
        assert record["how"].startswith(f"Exact for task {task}")
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        lora = PeftModel.from_pretrained(base, folder).eval()
        assert lora.peft_config["default"].peft_type.value == "LORA"
        with torch.no_grad():
            theirs, ours = lora(tokens).logits, model(tokens, tasks=task).logits
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        results.append(ours)
    assert not torch.allclose(results[0], results[1], atol=1e-4), "tasks differ"


def test_a_task_that_was_not_trained_on_is_refused(run, rows, capsys):
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["tasks"].append({**recipe["tasks"][0], "name": "new"})
    path = run.parent / "other.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["evaluate", str(run / "adapter"), "--recipe", str(path)]) == 2
    assert "was not trained on new; its tasks are up, rev, len" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["alora", "hydralora", "moelora", "align-lora", "mtl-lora"])
def test_the_alignment_loss_trains_and_is_not_in_the_reported_loss(method, tiny_base, rows, tmp_path):
    """It moves A, and the loss of the first steps stays that of the rows, whatever its weight."""
    options = {"adapter__method": method, "adapter__lora_dropout": 0.0, "training__max_steps": 2,
               "training__warmup_steps": 0}  # fmt: skip
    losses, states = [], []
    for weight in (0.0, 50.0):
        folder = tmp_path / f"{weight}"
        folder.mkdir()
        run = train(tiny_base, rows, folder, **options, adapter__alignment_loss=weight)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append(next(line["loss"] for line in log if "loss" in line))
        states.append(load_file(run / "adapter/adapter_model.safetensors"))
    A = next(name for name in states[0] if "_A.weight" in name)
    assert not torch.equal(states[0][A], states[1][A])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_align_lora_is_one_lora_and_merges(tiny_base, rows, tmp_path):
    run = train(
        tiny_base,
        rows,
        tmp_path,
        adapter__method="align-lora",
        training__max_steps=2,
        training__warmup_steps=0,
    )
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["num_experts"], config["alignment_loss"], config["alignment"]) == (1, 0.2, "kl")
    assert main(["export", str(run), f"--output={tmp_path / 'lora'}"]) == 0
    assert json.loads((tmp_path / "lora/export.json").read_text())["exact"] is True


def config_of(**adapter):
    tasks = [SimpleNamespace(name=name) for name in TASKS]
    return SimpleNamespace(adapter=AdapterSection(**adapter), kind="generate", tasks=tasks)


@pytest.mark.parametrize("method", ["alora", "hydralora", "moelora", "mtl-lora"])
@pytest.mark.parametrize("gate", ["token", "task", "uniform"])
def test_the_gate_is_a_setting_of_every_method(method, gate):
    made = build_adapter_config(config_of(method=method, gate=gate, alignment_loss=0.1, alignment="kl"))
    assert (made.gate, made.alignment_loss, made.alignment) == (gate, 0.1, "kl")
    assert made.task_map == (method == "mtl-lora")
    assert made.task_names == (TASKS if made.by_task or made.task_map else None)


def test_what_a_recipe_leaves_open_is_the_methods():
    adapter = AdapterSection(method="mtl-lora")
    assert [setting_of(adapter, name) for name in ("gate", "task_map", "alignment_loss")] == [
        "task",
        True,
        0.0,
    ]
    given = AdapterSection(method="mtl-lora", gate="token", task_map=False)
    assert [setting_of(given, name) for name in ("gate", "task_map")] == ["token", False]
    with pytest.warns(UserWarning, match="alignment_loss is ignored: .*`align-lora` is a LoRA that has it"):
        build_adapter_config(config_of(method="lora", alignment_loss=0.1))


def test_packed_rows_cannot_be_aligned(tiny_base, rows, tmp_path, capsys):
    recipe = training_recipe(
        tiny_base, rows, tmp_path / "run", adapter__alignment_loss=0.1, prompt__packing=True
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "adapter.alignment_loss compares rows position by position" in capsys.readouterr().err
