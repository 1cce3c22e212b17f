"""Every built-in recipe runs a step: the small ones on their own data and base, the paper's on stand-ins."""

import json
from pathlib import Path

import pytest

from braidlora.cli import main
from braidlora.config import RunConfig, built_in_recipes, load_config, schema_of
from helpers.data import require_sources, stand_in

ONE_STEP = [
    "--training.max_steps=1",
    "--training.batch_size=2",
    "--training.warmup_steps=0",
    "--evaluation.batch_size=50",  # the demo has its own 800 test rows
]
FEW_ROWS = ["--tasks.*.train.limit=4", "--tasks.*.test.limit=2"]
# Federated recipes have tests of their own.
RECIPES = [name for name in built_in_recipes() if schema_of(name) is RunConfig]
PAPER = [name for name in RECIPES if name.startswith("paper/")]
SMALL = [name for name in RECIPES if name not in PAPER]


def one_step(name: str, output: Path, capsys: pytest.CaptureFixture, *overrides: str) -> dict:
    code = main(["train", name, "--json", f"--output={output}", *ONE_STEP, *FEW_ROWS, *overrides])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")  # four rows do not have all labels
def test_a_small_recipe_runs_a_step_and_is_evaluated(name, tmp_path, capsys):
    config = load_config(name)
    require_sources(config)
    short = ["--evaluation.max_new_tokens=4"] if config.kind == "generate" else []
    metrics = one_step(name, tmp_path / "run", capsys, *short, *stand_in(config))
    assert set(metrics["tasks"]) == {
        task.name for task in config.tasks if task.test or "generated" in task.train.source
    }
    assert 0.0 <= metrics["mean"] <= 100.0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_runs_a_step_on_a_stand_in(name, tmp_path, capsys):
    """The recipe's own adapter, prompt, optimizer and decoding; another base, and rows of the right shape."""
    config = load_config(name)
    answers = ("the correct answer is answer1", "option2 true 7 A", "solution1 ending1 8 B", "x 9")
    rows = [
        {"instruction": f"Say {number}.", "input": "", "output": answer, "answer": answer}
        | {"task": task.name, "category": task.name}
        for task in config.tasks
        for number, answer in enumerate(answers)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    overrides = ["--model.path=embedded", "--model.dtype=float32", "--training.precision=float32"]
    for task in config.tasks:
        for part in ("train", "test"):
            if getattr(task, part) is not None:
                overrides.append(f"--tasks.{task.name}.{part}.source={data}")
                overrides.append(f"--tasks.{task.name}.{part}.where={{task: {task.name}}}")
        overrides.append(f"--tasks.{task.name}.extract=none")
    metrics = one_step(name, tmp_path / "run", capsys, *overrides, "--evaluation.max_new_tokens=4")
    assert set(metrics["tasks"]) == {task.name for task in config.tasks if task.test is not None}
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["num_experts"], saved["r"], saved["lora_alpha"], saved["share"]) == (3, 8, 16, "B")


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_papers_hyperparameters(name):
    """arXiv 2509.25414: N = 3, r = 8, alpha = 16, dropout 0.05, lr 3e-4, warm-up 100, batch 16, cutoff 256, 4 beams."""
    config = load_config(name)
    adapter, training = config.adapter, config.training
    assert (adapter.method, adapter.num_experts, adapter.r, adapter.lora_alpha) == ("alora", 3, 8, 16)
    assert (adapter.lora_dropout, training.learning_rate, training.warmup_steps) == (0.05, 3e-4, 100)
    assert training.batch_size * training.gradient_accumulation == 16
    assert (config.prompt.cutoff, config.prompt.train_on_prompt, config.evaluation.num_beams) == (
        256,
        True,
        4,
    )
    assert training.epochs == (50 if "flan" in name else 3)
    assert (
        config.evaluation.max_new_tokens
        == {"commonsense": 32, "math": 256, "flan": 80}[name.split("/")[1].split("_")[0]]
    )
    assert adapter.target_modules == (["q_proj", "v_proj"] if "llama2" in name else ["q_proj", "o_proj"])
