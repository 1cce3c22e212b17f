"""Run directories whose rounds hold the clients' states, as braidlora 0.1 wrote them, still resume, export and grow."""

import json
import shutil

import pytest
from client_states import state_path
from safetensors.torch import load_file

from braidlora.errors import CheckpointError
from braidlora.export.run import export
from braidlora.federated.simulation.add_client import add_client
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.final import final_models
from braidlora.federated.simulation.rollback import rollback
from braidlora.runs import FederatedDirectory, commit_directory, verify
from helpers.results import federation_bytes

SETTINGS = {"rule": "flora", "ranks": [2, 4, 3], "sample": {"number": 2}, "keep_rounds": 3}


def to_early_layout(run):
    """Move the clients' states into the rounds that build on them."""
    for folder in sorted((run / "rounds").iterdir()):
        counted = json.loads((folder / "server.json").read_text())["counted"]
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        for client, round in counted.items():
            files[f"clients/{client}.safetensors"] = state_path(run, client, round).read_bytes()
        with commit_directory(folder) as staging:
            (staging / "clients").mkdir()
            for name, content in files.items():
                (staging / name).write_bytes(content)
    for state in (run / "clients").glob("*/state"):
        shutil.rmtree(state)


@pytest.fixture(scope="module")
def early(tiny_base, rows, tmp_path_factory):
    """A finished federation of four rounds in the early layout."""
    from helpers.recipes import federated_config

    run = tmp_path_factory.mktemp("early") / "run"
    federate(federated_config(tiny_base, rows, run, rounds=4, **SETTINGS), progress=False)
    to_early_layout(run)
    return run


@pytest.fixture(scope="module")
def six(tiny_base, rows, tmp_path_factory):
    """The tensors of six rounds in today's layout."""
    from helpers.recipes import federated_config

    run = tmp_path_factory.mktemp("six") / "run"
    federate(federated_config(tiny_base, rows, run, rounds=6, **SETTINGS), progress=False)
    return tensors(run)


def tensors(run):
    """Adapters and shared states; the stores may name a state otherwise."""
    return {
        name: data
        for name, data in federation_bytes(run).items()
        if name.endswith(".safetensors") and "/state/" not in name
    }


@pytest.mark.parametrize("back_to", [None, 2, 3])
def test_it_resumes_and_rolls_back(early, six, make_config, tmp_path, back_to):
    """`run` stands at round 4; 2 goes back before its first resume in today's layout, 3 after it."""
    run = shutil.copytree(early, tmp_path / "run")
    if back_to == 2:
        rollback(FederatedDirectory(run), 2)
    elif back_to == 3:
        federate(make_config("run", rounds=5, **SETTINGS), resume="auto", progress=False)
        rollback(FederatedDirectory(run), 3)
    federate(make_config("run", rounds=6, **SETTINGS), resume="auto", progress=False)
    assert tensors(run) == six
    found = verify(run)
    assert (found["damaged"], found["not_covered"], found["unfinished"]) == ([], [], [])


def test_it_resumes_from_a_round_that_a_kill_cut_off(early, six, make_config, tmp_path):
    """The kill left a round in the making, with the first state of it."""
    run = shutil.copytree(early, tmp_path / "run")
    for name in ("metrics.json", "report.html"):
        (run / name).unlink(missing_ok=True)
    partial = run / "rounds" / ".round-5.1-0123abcd.partial" / "clients"
    partial.mkdir(parents=True)
    (partial / "up.safetensors").write_bytes(b"half a sta")
    federate(make_config("run", rounds=6, **SETTINGS), resume="auto", progress=False)
    assert tensors(run) == six


def test_it_is_read_without_a_resume(early, make_config, tmp_path):
    """Its models, an export, a client that joins; a damaged state is found."""
    run = shutil.copytree(early, tmp_path / "run")
    for client, host in final_models(FederatedDirectory(run)):
        assert host.parameters(), client.name
    add_client(run, "west", tasks=["up"], epochs=1)
    export(run / "clients" / "up", tmp_path / "up-lora")
    assert load_file(tmp_path / "up-lora" / "adapter_model.safetensors")
    assert not list(run.glob("clients/*/state")), "reading changes nothing"
    again = federate(make_config("run", rounds=4, **SETTINGS), resume="auto", progress=False)
    assert again.metrics == json.loads((early / "metrics.json").read_text())
    state = next((run / "rounds" / "round-4" / "clients").iterdir())
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{state.name}.*changed since it was written"):
        next(final_models(FederatedDirectory(run)))
