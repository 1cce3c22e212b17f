"""`braidlora demo` on one small task: what it compares, and how it ends."""

import json

import pytest

from braidlora.cli import main
from braidlora.comparison import compare
from braidlora.config import load_config

SOURCE = "{source: 'generated:sum', limit: 6}"
SMALL = [
    f"--tasks=[{{name: sum, train: {SOURCE}, test: {SOURCE}}}]", "--training.max_steps=1",
    "--training.gradient_accumulation=1", "--training.batch_size=6", "--training.warmup_steps=0",
]  # fmt: skip


@pytest.mark.slow
def test_it_compares_three_methods_and_three_seeds_and_ends_with_the_path_of_its_report(tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", f"--output={output}", *SMALL]) == 0
    printed = capsys.readouterr()
    assert f"\nReport  {output / 'report.html'}" in printed.out
    assert "Δm%" not in printed.out  # it compares tasks, and there is one
    assert "not significantly different from" in printed.out
    comparison = json.loads((output / "comparison.json").read_text())
    assert [row["name"] for row in comparison["rows"]] == ["lora", "hydralora", "alora"]
    assert [row["seeds"] for row in comparison["rows"]] == [[0, 1, 2]] * 3
    assert comparison["base"]["tasks"].keys() == comparison["majority"]["tasks"].keys() == {"sum"}
    assert comparison["references"]["scores"] is None
    assert "ALoRA" in (output / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in (output / "cells").iterdir()) == sorted(
        f"{method}-seed{seed}" for method in ("lora", "hydralora", "alora") for seed in (0, 1, 2)
    )
    assert main(["demo", f"--output={output}", *SMALL, "--json"]) == 0
    again = capsys.readouterr()
    assert again.err == ""
    assert json.loads(again.out)["rows"] == comparison["rows"]


@pytest.mark.slow
def test_alora_learns_every_task_of_the_demo(tmp_path):
    recipe = load_config("demo", [f"--output={tmp_path / 'demo'}"])
    result = compare(recipe, methods=["alora"], seeds=[0], references="none", report=False, progress=False)
    [alora], base, majority = result["rows"], result["base"], result["majority"]
    assert alora["mean"]["mean"] >= max(base["mean"], majority["mean"]) + 30.0
    behind = {
        task: score["mean"]
        for task, score in alora["tasks"].items()
        if score["mean"] <= majority["tasks"][task]
    }
    assert not behind
