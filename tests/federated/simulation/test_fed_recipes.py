"""Every federated recipe runs a round of one step a client, on its own base and data or on stand-ins."""

import json

import pytest

from braidlora.cli import main
from braidlora.config import FederatedConfig, built_in_recipes, load_config, schema_of
from helpers.data import require_sources, stand_in

RECIPES = [name for name in built_in_recipes() if schema_of(name) is FederatedConfig]
PAPER = [name for name in RECIPES if name.startswith("paper/")]
ONE_STEP = [
    "--federation.rounds=1", "--federation.local={steps: 1}", "--federation.evaluate_every=0",
    "--training.batch_size=2", "--evaluation.batch_size=2",
]  # fmt: skip


def one_step(name, output, capsys, *overrides):
    code = main(["federate", name, "--json", f"--output={output}", *ONE_STEP, *overrides])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")  # four rows do not have all labels
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PAPER])
def test_a_small_recipe_runs_a_step_and_is_scored(name, tmp_path, capsys):
    config = load_config(name, [], FederatedConfig)
    require_sources(config)
    few = 200 if config.federation.partition else 4
    rows = [
        f"--tasks.*.train.limit={few}",
        "--tasks.*.test.limit=20" if few > 4 else "--tasks.*.test.limit=2",
    ]
    if config.kind == "generate":
        rows += [f"--tasks.{task.name}.max_new_tokens=2" for task in config.tasks]
    metrics = one_step(name, tmp_path / "run", capsys, *rows, *stand_in(config))
    assert set(metrics["clients"]) == {client.name for client in config.clients()}
    assert 0.0 <= metrics["mean"] <= 100.0
    for client in metrics["clients"]:
        assert (tmp_path / "run" / "clients" / client / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_runs_a_step_on_a_stand_in(name, tmp_path, capsys):
    config = load_config(name, [], FederatedConfig)
    rows = [
        {"instruction": f"Say {number}.", "input": "", "output": "x 9", "task": task.name}
        for task in config.tasks
        for number in range(4)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    overrides = [
        "--evaluation.max_new_tokens=2",
        "--model.path=embedded",
        "--model.dtype=float32",
        "--training.precision=float32",
    ]
    for task in config.tasks:
        for part in ("train", "test"):
            overrides.append(f"--tasks.{task.name}.{part}.source={data}")
            overrides.append(f"--tasks.{task.name}.{part}.where={{task: {task.name}}}")
    metrics = one_step(name, tmp_path / "run", capsys, *overrides)
    expected = {
        "paper/fed_flan_llama2_7b": [8] * 8,
        "paper/fed_flan_llama2_7b_het": [64, 64, 32, 32, 16, 16, 8, 8],
    }
    ranks = [metrics["clients"][task.name]["rank"] for task in config.tasks]
    assert ranks == expected[name]
    first = json.loads(
        (tmp_path / "run" / "clients" / "snli" / "adapter" / "adapter_config.json").read_text()
    )
    assert first["lora_alpha"] == 2 * first["r"], "one scaling s = 2 for all"


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_papers_hyperparameters(name):
    """arXiv 2509.25414: r = 8 or the rank list with m = 16, s = 2, dropout 0.05, lr 3e-4, batch 16, cutoff 256."""
    config = load_config(name, [], FederatedConfig)
    assert (config.adapter.r, config.scaling, config.adapter.lora_dropout) == (8, 2.0, 0.05)
    assert (config.training.learning_rate, config.training.batch_size) == (3e-4, 16)
    assert (config.prompt.cutoff, config.prompt.train_on_prompt, config.evaluation.num_beams) == (
        256,
        True,
        4,
    )
    assert config.federation.r_intermediate == 16
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
