"""benchmarks/evidence.py on a tiny base: the stages, the plan, and what a second start does."""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from braidlora.config import dump_config, load_config, override_config
from braidlora.runs import cover, covered
from helpers.recipes import run_config
from helpers.tiny_base import build_base, write_rows

METHODS = ("lora", "alora")


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import evidence

    return evidence


def tuning_of(root):
    return json.loads((root / "tuning" / "comparison.json").read_text())


@pytest.mark.slow
def test_a_table_from_tuning_to_the_result(evidence, tmp_path):
    base, rows = build_base(tmp_path / "base"), write_rows(tmp_path)
    shorter = {"training__epochs": 1, "training__load_best": True, "split__validation": 0.2}
    config = run_config(base, rows, tmp_path / "run", **shorter)
    tasks = [task.model_dump(mode="json") for task in config.tasks[:2]]
    recipe = override_config(config, {"tasks": tasks, "training.threads": 1})
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe))
    table = evidence.Table(
        recipe=str(tmp_path / "recipe.yaml"),
        overrides={},
        methods=METHODS,
        rates=(1e-3, 1e-2),
        seeds=(0, 1),
        single_epochs=2,
        rows={"uniform-gate": {"adapter.gate": "uniform"}},
        variants={"alora": {"alora-of-two": {"adapter.num_experts": 2}}},
        cheaper={"tasks.*.train.limit": 12},
    )
    root = tmp_path / "evidence"
    assert "tuning      8 runs,    0 done" in evidence.plan(table, recipe, root)
    result = evidence.run(table, recipe, root, "the command", progress=False)
    comparison = result["comparison"]
    tried = {row["name"]: row for row in result["tuning"]}
    assert set(tried) == {*METHODS, "uniform-gate", "alora-of-two"}
    for row in comparison["rows"]:
        names = ["alora", "alora-of-two"] if row["name"] == "alora" else [row["name"]]
        losses = {
            (name, point["values"]["training.learning_rate"]): point["validation_loss"]["mean"]
            for name in names
            for point in tried[name]["tuning"]
        }
        name, rate = min(losses, key=losses.get)
        assert row["overrides"]["training.learning_rate"] == rate
        assert row["overrides"].get("adapter.num_experts") == (2 if name == "alora-of-two" else None)
        assert len(row["mean"]["values"]) == 2
        assert row["tuned"] is None
    assert {row["name"] for row in comparison["rows"]} == {*METHODS, "uniform-gate"}
    assert comparison["base"] is not None
    [first, _] = [task.name for task in recipe.tasks]
    [left_out] = evidence.unlearned(replace(table, unlearned=(first,)), tuning_of(root)).values()
    assert set(left_out["rows"]) == {*METHODS, "uniform-gate", "alora-of-two"}
    assert 0 <= left_out["majority"] <= 100
    limits = [
        load_config(str(root / stage / "recipe.yaml")).tasks[0].train.limit for stage in ("tuning", "main")
    ]
    assert limits == [12, None]
    runs = {stage: sum(found.values()) for stage, found in result["machines"].items()}
    assert runs == {"tuning": 8, "single": 4, "main": 6}
    for scores in result["single"].values():
        assert len(scores["values"]) == 2
    plan = evidence.plan(table, recipe, root)
    assert "single      4 runs,    4 done" in plan
    assert "0.0 hours of one core left" in plan
    assert not list(root.glob("**/checkpoints")), "checkpoints of finished runs are removed"

    times = {path: path.stat().st_mtime_ns for path in root.glob("**/cell.json")}
    again = evidence.run(table, recipe, root, "the command", progress=False)
    assert {path: path.stat().st_mtime_ns for path in root.glob("**/cell.json")} == times
    assert json.dumps(again["comparison"]["rows"]) == json.dumps(comparison["rows"])

    rates = {"lora": 1e-3, "alora": 1e-2}
    [unlearned, kept] = [task.name for task in recipe.tasks]
    fixed = replace(table, rows={}, variants={}, fixed=rates, single_epochs=0, unlearned=(unlearned,))
    assert "tuning      0 runs" in evidence.plan(fixed, recipe, tmp_path / "fixed")
    untuned = evidence.run(fixed, recipe, tmp_path / "fixed", "the command", progress=False)
    assert untuned["tuning"] == []
    used = {row["name"]: row["overrides"]["training.learning_rate"] for row in untuned["comparison"]["rows"]}
    assert used == rates
    assert list(untuned["comparison"]["tasks"]) == [kept]


def test_a_packed_table_resumes_elsewhere(evidence, tmp_path):
    cell = tmp_path / "runs" / "main" / "cells" / "lora-seed0"
    weights = cell / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"many")
    for name in ("cell.json", "metrics.json"):
        (cell / name).write_text("{}")
    cover(cell, ["adapter/adapter_model.safetensors", "cell.json", "metrics.json"])
    (cell.parent / "alora-seed0").mkdir()
    (tmp_path / "runs" / "main" / "recipe.yaml").write_text("tasks: []\n")

    assert evidence.pack(tmp_path / "runs", tmp_path / "runs.tar.gz") == 1
    with tarfile.open(tmp_path / "runs.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there" / "main" / "cells" / "lora-seed0"
    assert set(covered(there)) == {"cell.json", "metrics.json"}
    assert not (there / "adapter").exists()
    assert weights.is_file(), "the original keeps its weights"
    assert not (there.parent / "alora-seed0").exists(), "what has not finished is left out"
    assert (tmp_path / "there" / "main" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_parts_that_run_together_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "parts.py").write_text(
        "import functools, os, pathlib, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent / 'benchmarks')!r})\n"
        "import evidence\n"
        "def wait(path):\n"
        "    pathlib.Path(path).write_text(str(os.getpid()))\n"
        "    time.sleep(120)\n"
        "if __name__ == '__main__':\n"
        "    evidence._run_together([functools.partial(wait, name) for name in ('one', 'other')], 2)\n"
    )
    started = subprocess.Popen([sys.executable, "parts.py"], cwd=tmp_path)
    places = [tmp_path / "one", tmp_path / "other"]
    end = time.monotonic() + 120
    while not all(place.is_file() and place.read_text() for place in places):
        assert time.monotonic() < end
        assert started.poll() is None
        time.sleep(0.1)
    started.terminate()
    assert started.wait(timeout=60) == 143
    for place in places:
        with pytest.raises(ProcessLookupError):
            os.kill(int(place.read_text()), 0)


def test_every_table_is_a_valid_recipe(evidence):
    for table in evidence.TABLES.values():
        recipe = evidence.table_recipe(table, ["--model.path=embedded"] if table.base == "gemma" else [])
        assert recipe.training.load_best
        assert set(table.minutes) == {"tuning", "main", *(["single"] if table.single_epochs else [])}
        assert len(table.seeds) >= (3 if table.recipe == "flan8" else 5)


def test_gemma_that_is_not_installed_is_named(evidence, monkeypatch):
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make bases BASES=gemma"):
        evidence.table_recipe(evidence.TABLES["flan8-gemma"])
    assert evidence.table_recipe(evidence.TABLES["flan8-smollm2"]).model.gguf_file is None
