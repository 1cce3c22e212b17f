"""What lies in a federation's folders counts only where a manifest, or the federation itself, lists it."""

import json
import shutil

import pytest
from client_states import state_path, state_paths

from braidlora.analysis.targets import find_targets
from braidlora.errors import CheckpointError, ConfigError
from braidlora.export.run import export
from braidlora.federated.protocol.state import ClientState
from braidlora.federated.protocol.wire import parse
from braidlora.federated.simulation import runner
from braidlora.federated.simulation.add_client import add_client
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.store import ClientStore
from braidlora.runs import verify
from helpers.results import federation_bytes
from helpers.tiny_base import TASKS


def listed(folder):
    return set(json.loads((folder / "manifest.json").read_text())["files"])


def tensors_of(run):
    """Shared states, clients' states and adapters; which rounds were scored depends on what was to be the last one."""
    return {name: data for name, data in federation_bytes(run).items() if name.endswith(".safetensors")}


def test_a_planted_state_is_neither_used_nor_signed(make_config, tmp_path):
    """One client of three is drawn a round: two have no state yet, and one is put there for each of them."""
    settings = {"rule": "fedsa-lora", "sample": {"number": 1}}
    federate(make_config("whole", rounds=3, **settings), progress=False)
    federate(make_config("run", rounds=1, **settings), progress=False)
    [(taken, path)] = state_paths(tmp_path / "run", 1).items()
    tensors, header = parse(path.read_bytes(), str(path))
    for name in {*TASKS, "ghost"} - {taken}:
        forged = {key: tensor + 1.0 for key, tensor in tensors.items()}
        state = ClientState(name, json.loads(header)["experiment"], 1, forged)
        store = ClientStore(tmp_path / "run" / "clients" / name, name)
        store.hold(state)
        store.commit()
    federate(make_config("run", rounds=3, **settings), resume="auto", progress=False)
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    third = tmp_path / "run" / "rounds" / "round-3"
    assert listed(third) == listed(tmp_path / "whole" / "rounds" / "round-3")
    assert {str(path.relative_to(third)) for path in third.rglob("*") if path.is_file()} - listed(third) == {
        "manifest.json"
    }


def test_what_is_put_into_a_round_in_the_making_is_not_signed(make_config, tmp_path, monkeypatch):
    step = runner.client_step

    def planting(host, client, payload, state, **options):
        [staging] = (tmp_path / "run" / "rounds").glob(f".round-{payload.round}.*.partial")
        for name in ("clients/ghost.safetensors", "shared.safetensors.bak", "clients/deep/x"):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text("planted")
        (staging / "clients" / "link").unlink(missing_ok=True)
        (staging / "clients" / "link").symlink_to(tmp_path)
        return step(host, client, payload, state, **options)

    monkeypatch.setattr(runner, "client_step", planting)
    federate(make_config(rounds=1), progress=False)
    folder = tmp_path / "run" / "rounds" / "round-1"
    assert listed(folder) == {"shared.safetensors", "server.json", "rounds.jsonl"}
    assert {path.name for path in folder.rglob("*") if not path.is_dir()} == {
        "manifest.json",
        *listed(folder),
    }


@pytest.mark.parametrize("gone", [False, True])
def test_a_state_that_changes_while_the_federation_runs_is_refused(make_config, tmp_path, monkeypatch, gone):
    """It is checked as it is read, not only when the federation begins."""
    step = runner.client_step

    def tampering(host, client, payload, state, **options):
        if payload.round == 2 and client.name == "len":
            path = state_path(tmp_path / "run", "up", 1)
            content = path.read_bytes()
            path.unlink()
            if not gone:
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return step(host, client, payload, state, **options)

    monkeypatch.setattr(runner, "client_step", tampering)
    with pytest.raises(
        CheckpointError, match=r"up/state/pending-1/state\.safetensors: " + ("missing" if gone else "sha256")
    ):
        federate(make_config(), progress=False)


def test_folders_that_are_no_rounds(make_config, tmp_path):
    federate(make_config("whole", rounds=3), progress=False)
    federate(make_config("run"), progress=False)
    rounds = tmp_path / "run" / "rounds"
    shutil.copytree(rounds / "round-2", rounds / "round-07")  # no name that a round is committed under
    (rounds / "round-9").write_text("a file")
    federate(make_config("run", rounds=3), resume="auto", progress=False)
    shutil.rmtree(rounds / "round-07")
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    (rounds / "round-9").unlink()
    shutil.copytree(rounds / "round-3", rounds / "round-4")
    with pytest.raises(CheckpointError, match=r"round-4: contains round 3.*Round 3 is intact"):
        federate(make_config("run", rounds=5), resume="auto", progress=False)


def test_verify_vouches_for_a_federation_with_a_client_that_was_added_and_one_that_failed(
    make_config, monkeypatch
):
    step = runner.client_step

    def failing(host, client, *rest, **options):
        if client.name == "len":
            raise RuntimeError("x")
        return step(host, client, *rest, **options)

    monkeypatch.setattr(runner, "client_step", failing)
    run = federate(make_config(rounds=1), progress=False).directory
    add_client(run, "west", tasks=["up"], epochs=1)
    federate(make_config(rounds=2), resume="auto", progress=False)
    found = verify(run)
    assert (found["damaged"], found["not_covered"], found["unfinished"]) == ([], [], [])
    assert (run / "clients" / "len" / "errors.log").is_file()
    added = run / "clients" / "west" / "added.json"
    added.write_text(added.read_text().replace("west", "wast"))
    assert [one["file"] for one in verify(run)["damaged"]] == ["clients/west/added.json"]


def test_adapters_of_nobody_are_not_the_federations(make_config, tmp_path):
    run = federate(make_config(rounds=1), progress=False).directory
    shutil.copytree(run / "clients" / "up", run / "clients" / "evil")
    assert sorted(target.label for target in find_targets([run])) == sorted(TASKS)
    with pytest.raises(ConfigError, match=r"NAME is one of len, rev, up\.$"):
        export(run)
    (run / "clients" / "linked").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="linked is a link to"):
        federate(make_config(rounds=2), resume="auto", progress=False)


def test_answers_of_tasks_that_a_client_has_no_more_do_not_stay(make_config):
    run = federate(make_config(rounds=1), progress=False).directory
    folder = run / "clients" / "up" / "predictions"
    (folder / "stale.jsonl").write_text("{}\n")
    federate(make_config(rounds=2), resume="auto", progress=False)
    assert [path.name for path in folder.iterdir()] == ["up.jsonl"]
