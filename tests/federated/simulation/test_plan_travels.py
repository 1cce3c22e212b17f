"""What `plan` says will travel is what `federate` logs, to the byte."""

import json

import pytest

from braidlora.config import dump_config
from braidlora.federated.simulation.driver import federate
from braidlora.plan.run import plan
from helpers.tiny_base import TASKS


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (
            "fed-alora",
            {"ranks": [4, 4, 4], "kind": "classify", "share_head": True, "upload_dtype": "bfloat16"},
        ),
        ("fed-alora-het", {"ranks": [16, 4, 3], "r_intermediate": 6, "wire": "smallest"}),
    ],
    ids=["16 bits and a shared head", "smallest"],
)
def test_the_plan_is_what_travels(rule, settings, make_config, tmp_path):
    config = make_config(rule=rule, **settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    planned = plan(recipe)
    [own] = [
        one for one in planned["rules"] if one["rule"] == rule and one["wire"] in (None, settings.get("wire"))
    ]
    by_rank = {one["rank"]: one for one in own["by_rank"]}
    directory = federate(config, progress=False).directory
    lines = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        for name, rank in zip(TASKS, settings["ranks"], strict=True):
            down = 0 if line["round"] == 1 else by_rank[rank]["down_bytes"]
            assert line["clients"][name]["up"] == by_rank[rank]["up_bytes"]
            assert line["clients"][name]["down"] == down
    for way in ("up", "down"):
        assert sum(line["bytes"][way] for line in lines) == own["all_rounds"][f"{way}_bytes"]
    files = {one["rank"]: one["file_bytes"] for one in planned["adapters"]}
    for name, rank in zip(TASKS, settings["ranks"], strict=True):
        saved = directory / "clients" / name / "adapter" / "adapter_model.safetensors"
        assert saved.stat().st_size == files[rank]


@pytest.mark.filterwarnings("ignore:federation.sample draws")  # ranks that no drawn client has
@pytest.mark.parametrize("rule", ["flora", "zero-padding"])
def test_the_bytes_of_all_rounds_are_those_of_the_clients_that_are_drawn(rule, make_config, tmp_path):
    """What is sent depends on the ranks of those who are asked, and in flora on who missed a round."""
    config = make_config(rule=rule, ranks=[9, 2, 5], sample={"number": 1}, rounds=5, seed=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    [own] = [one for one in plan(recipe)["rules"] if one["rule"] == rule]
    metrics = federate(config, progress=False).metrics
    assert own["all_rounds"] == {f"{way}_bytes": metrics["bytes"][way] for way in ("up", "down")}
