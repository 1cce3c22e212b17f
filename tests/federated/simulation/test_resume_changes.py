"""What may change when a federation is resumed, through the command line: who leaves, who joins, quorum, scoring."""

import json
import re
from pathlib import Path

import pytest
import yaml
from client_states import state_path
from safetensors.torch import load_file

from braidlora.cli import main
from braidlora.config import FederatedConfig, recipe_differences
from braidlora.federated.simulation.resume import MAY_CHANGE
from braidlora.runs import FederatedDirectory
from helpers.recipes import federated_recipe
from helpers.results import federation_bytes

CLIENTS = [
    {"name": name, "tasks": [task]} for name, task in (("east", "up"), ("north", "rev"), ("west", "len"))
]


@pytest.fixture
def run(tiny_base, rows, tmp_path, capsys):
    """`run(*words, output="run", **overrides)`: exit code and stderr of `braidlora federate` with that recipe."""

    def call(*words, output="run", **overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump(federated_recipe(tiny_base, rows, tmp_path / output, **overrides)),
            encoding="utf-8",
        )
        code = main(["federate", str(path), f"--output={tmp_path / output}", "--json", *words])
        return code, capsys.readouterr().err

    return call


def lines(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def metrics(directory):
    return json.loads((directory / "metrics.json").read_text())


def without(clients, name):
    return [client for client in clients if client["name"] != name]


def test_a_client_that_left_takes_no_part_and_may_come_back(run, tmp_path):
    tasks = {"common_test": ["rev"]}  # so that the task stays in the recipe without its client
    assert run(clients=CLIENTS, rounds=1, **tasks)[0] == 0
    first = state_path(tmp_path / "run", "north", 1).read_bytes()
    with pytest.warns(UserWarning, match="resuming after round 1 with changes.*left: north"):
        code, err = run("--resume", "auto", clients=without(CLIENTS, "north"), rounds=2, **tasks)
    assert code == 0, err
    [_, second] = lines(tmp_path / "run")
    assert second["changes"] == {"left": ["north"]}
    assert second["clients"].keys() == {"east", "west"}
    assert state_path(tmp_path / "run", "north", 1).read_bytes() == first, "its last state stays"
    found = metrics(tmp_path / "run")
    assert found["clients"].keys() == {"east", "west"}
    assert found["departed"]["north"] | {"last_score": 0} == {
        "rank": 4, "left_after": 1, "rounds": 1, "last_score": 0,
    }  # fmt: skip
    shared = load_file(tmp_path / "run" / "rounds" / "round-2" / "shared.safetensors")
    east, west = (load_file(state_path(tmp_path / "run", name, 2)) for name in ("east", "west"))
    for name, tensor in shared.items():
        expected = (19 * east[name].double() + 8 * west[name].double()) / 27
        assert (tensor.double() - expected).abs().max() < 1e-7
    with pytest.warns(UserWarning, match="joined: north"):
        code, err = run("--resume", "auto", clients=CLIENTS, rounds=3, **tasks)
    assert code == 0, err
    third = lines(tmp_path / "run")[2]
    assert third["changes"] == {"joined": ["north"]}
    assert "loss" in third["clients"]["north"]
    assert "departed" not in metrics(tmp_path / "run")


def test_a_client_joins_a_federation_on_its_way(run, tmp_path):
    """It receives what is shared and starts from the recipe's seed, as one that was not drawn until then."""
    assert run(clients=[*CLIENTS[:2], {"name": "zed", "tasks": ["len"]}], rounds=1, retries=0)[0] == 0
    joined = [*CLIENTS[:2], {"name": "zed", "tasks": ["len"]}, {"name": "young", "tasks": ["len"]}]
    with pytest.warns(UserWarning, match="joined: young"):
        code, err = run("--resume", "auto", clients=joined, rounds=2, retries=0)
    assert code == 0, err
    assert metrics(tmp_path / "run")["clients"]["young"]["rounds"] == 1
    shared = load_file(tmp_path / "run" / "rounds" / "round-2" / "shared.safetensors")
    saved = load_file(tmp_path / "run" / "clients" / "young" / "adapter" / "adapter_model.safetensors")
    assert all((saved[name] == tensor).all() for name, tensor in shared.items())


def test_a_client_that_was_added_cannot_join_under_its_name(run, rows, tmp_path, capsys):
    assert run(clients=CLIENTS, rounds=1)[0] == 0
    words = ["--name", "young", "--tasks", "len", "--epochs", "1", "--json"]
    assert main(["federate", "add-client", str(tmp_path / "run"), *words]) == 0
    joined = [*CLIENTS, {"name": "young", "tasks": ["len"]}]
    code, err = run("--resume", "auto", clients=joined, rounds=2)
    assert (code, "young was added with `federate add-client`" in err) == (2, True), err


def test_the_last_of_a_task_leaves_with_its_task(run, tmp_path, tiny_base, rows):
    """Without a list every task is a client: its site leaves by removing the task."""
    assert run(rounds=1)[0] == 0
    data = federated_recipe(tiny_base, rows, tmp_path / "run", rounds=2)
    tasks = [task for task in data["tasks"] if task["name"] != "rev"]
    with pytest.warns(UserWarning, match="left: rev"):
        code, err = run("--resume", "auto", tasks=tasks, rounds=2)
    assert code == 0, err
    assert lines(tmp_path / "run")[1]["clients"].keys() == {"len", "up"}


def test_too_few_clients_and_the_way_on_that_is_named(run, tmp_path, monkeypatch):
    from braidlora.federated.simulation import runner

    step = runner.client_step

    def failing(host, client, *rest, **options):
        if client.name == "north":
            raise RuntimeError("row 17 of the site: Mrs. Miller")
        return step(host, client, *rest, **options)

    monkeypatch.setattr(runner, "client_step", failing)
    code, err = run(clients=CLIENTS, min_clients=3)
    assert code == 6
    assert "lower federation.min_clients" in err
    assert "--resume auto then runs these rounds again" in err

    def stopped(directory, keep):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(FederatedDirectory, "clear", stopped)  # the rounds are gone, and nothing is new yet
        with pytest.warns(UserWarning, match="none of its 2 rounds counted, so all are run again"):
            assert run("--resume", "auto", clients=CLIENTS, min_clients=2)[0] == 4
    code, err = run("--resume", "auto", clients=CLIENTS, min_clients=2)
    assert code == 0, err
    assert "warning: client north NEVER PARTICIPATED: failed in rounds 1, 2" in err
    found = metrics(tmp_path / "run")["failing"]
    assert found == {
        "north": {"left_out": [1, 2], "trained": 0, "codes": ["internal"], "last": "RuntimeError [internal]"}
    }
    assert all(line["counted"] for line in lines(tmp_path / "run"))
    monkeypatch.setattr(runner, "client_step", step)
    assert run(output="two", clients=CLIENTS, min_clients=2)[0] == 0, (
        "a calm federation has nothing to report"
    )
    assert "failing" not in metrics(tmp_path / "two")


def test_the_quorum_is_lowered_in_the_middle(run, tmp_path):
    assert run(clients=CLIENTS, rounds=1, min_clients=3)[0] == 0
    with pytest.warns(UserWarning, match="federation.min_clients: 3 then, 2 now"):
        code, err = run("--resume", "auto", clients=without(CLIENTS, "north"), rounds=2, min_clients=2,
                        common_test=["rev"])  # fmt: skip
    assert code == 0, err
    noted = lines(tmp_path / "run")[1]["changes"]["settings"]
    assert noted["federation.min_clients"] == {"then": 3, "now": 2}


def test_scores_made_in_another_way_are_made_again(run, tmp_path):
    assert run(rounds=1, evaluate_every=1)[0] == 0
    before = metrics(tmp_path / "run")
    answered = (tmp_path / "run" / "clients" / "up" / "predictions" / "up.jsonl").read_text()
    with pytest.warns(UserWarning, match=r"federation.common_test: \[\] then, \['up'\] now"):
        assert run("--resume", "auto", rounds=1, common_test=["up"], evaluate_every=1)[0] == 0
    now = metrics(tmp_path / "run")
    assert "common" not in before
    assert now["common"]["aggregated"] is not None
    assert now["before"]["mean"] is None, "of a model that was not scored in this way"
    assert (tmp_path / "run" / "clients" / "up" / "predictions" / "up.jsonl").read_text() == answered
    with pytest.warns(UserWarning, match="common_test"):  # the round itself was scored without it
        code, err = run("--resume", "auto", rounds=2, common_test=["up"], evaluate_every=1)
    assert code == 0, err
    second = lines(tmp_path / "run")[1]
    assert second["changes"]["settings"]["federation.common_test"] == {"then": [], "now": ["up"]}
    assert all("before_common" in one for one in second["clients"].values())


REFUSED = {
    "training__learning_rate": (0.01, "training.learning_rate: 0.05 then, 0.01 now"),
    "rule": ("fedsa-lora", "federation.rule: fed-alora then, fedsa-lora now"),
    "adapter__r": (2, "client east: rank 4 then, 2 now"),
    "seed": (5, "seed: 1 then, 5 now"),
    "split__test": (0.3, "rows of east.up.train: sha256 "),
    "lr_schedule": ({"decay": "cosine"}, "federation.lr_schedule.decay: constant then, cosine now"),
    "local": ({"steps": 3}, "federation.local.steps: None then, 3 now"),
}


def test_all_else_is_refused_by_name_with_both_values(run, tmp_path):
    assert run(clients=CLIENTS, rounds=1)[0] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for key, (value, said) in REFUSED.items():
        code, err = run("--resume", "auto", clients=CLIENTS, rounds=2, **{key: value})
        assert (code, said in err) == (5, True), err
    changed = [{**CLIENTS[0], "seed": 3}, *CLIENTS[1:]]
    code, err = run("--resume", "auto", clients=changed, rounds=2)
    assert code == 5
    assert re.search(r"client east: seed \d+ then, 3 now", err)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


def test_the_rest_of_a_federation_trains_as_if_the_one_that_left_had_failed(run, tmp_path, monkeypatch):
    from braidlora.federated.simulation import runner

    step = runner.client_step
    settings = {"rule": "fedit", "common_test": ["rev"]}
    assert run(clients=CLIENTS, rounds=1, **settings)[0] == 0
    with pytest.warns(UserWarning, match="left: north"):
        assert run("--resume", "auto", clients=without(CLIENTS, "north"), **settings)[0] == 0

    def failing(host, client, payload, *rest, **options):
        if client.name == "north" and payload.round == 2:
            raise RuntimeError("gone")
        return step(host, client, payload, *rest, **options)

    monkeypatch.setattr(runner, "client_step", failing)
    assert run(output="failed", clients=CLIENTS, **settings)[0] == 0
    left, failed = (federation_bytes(tmp_path / name) for name in ("run", "failed"))
    for name in ("rounds/round-2/shared.safetensors", "clients/east/adapter/adapter_model.safetensors"):
        assert left[name] == failed[name], name


def test_a_directory_of_the_first_version_resumes(run, tmp_path, make_config):
    """There experiment.json held the tasks as a list, and neither clients nor keys that are new since."""
    assert run(rounds=1)[0] == 0
    path = tmp_path / "run" / "experiment.json"
    saved = json.loads(path.read_text())
    config = make_config(rounds=1).model_dump(mode="json")
    for key in ("output", "evaluation"):
        del config[key]
    del config["model"]["path"], config["adapter"]["target_parameters"]
    for key in ("logging_steps", "threads"):
        del config["training"][key]
    new = ("lr_schedule", "evaluate_sample", "keep_rounds", "weights", "padding", "change_cap")
    for key in ("workers", "evaluate_every", "common_test", "retries", "rounds", *new):
        del config["federation"][key]
    path.write_text(json.dumps({"id": saved["id"], "config": config, "data": {}, "base": saved["base"]}))
    (tmp_path / "run" / "manifest.json").unlink()
    code, err = run("--resume", "auto", rounds=2)
    assert code == 0, err
    assert json.loads(path.read_text()) == saved, "and is written as it is now"
    code, err = run("--resume", "auto", rounds=2, training__learning_rate=0.01)
    assert (code, "training.learning_rate: 0.05 then, 0.01 now" in err) == (5, True), err


def test_the_docs_list_what_may_change():
    page = Path(__file__).parents[3].joinpath("docs", "reference", "federated.md").read_text(encoding="utf-8")
    table = page.split("<!-- may change: begin -->")[1].split("<!-- may change: end -->")[0]
    listed = re.findall(
        r"`([a-z_*.A-Z]+)`", "\n".join(row.split("|")[1] for row in table.strip().split("\n")[2:])
    )
    assert sorted(listed) == sorted(MAY_CHANGE)


def test_a_key_that_an_earlier_version_lacked_stands_for_its_default():
    old = {"adapter": {"r": 4}, "tasks": {"a": {}}, "federation": {"rounds": 2}}
    for section, key, default, other in (
        ("adapter", "target_parameters", None, ["experts"]),
        ("federation", "change_cap", 100.0, 5.0),
    ):
        assert not recipe_differences(old, {**old, section: {**old[section], key: default}}, FederatedConfig)
        [(name, then, now)] = recipe_differences(
            old, {**old, section: {**old[section], key: other}}, FederatedConfig
        )
        assert (name, then, now) == (f"{section}.{key}", "nothing", other)
    assert not recipe_differences(old, {**old, "tasks": {"a": {"options": None}}}, FederatedConfig)
