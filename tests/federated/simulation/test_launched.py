"""`federate` under torchrun: two CPU processes train each client together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from braidlora.cli import main
from braidlora.config import dump_config
from braidlora.errors import CheckpointError
from braidlora.federated.simulation import driver
from braidlora.federated.simulation.driver import federate

SCRIPT = Path(__file__).parents[1] / "group_process.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RULES = {
    "fed-alora": {"optimizer_state": "keep"},
    "fedit": {"proximal_mu": 0.5},
    "flora": {},
}  # fmt: skip
MORE = {
    "fedsa-lora": {"optimizer_state": "keep", "training__gradient_accumulation": 2, "proximal_mu": 0.5},
    "classify": {"kind": "classify", "rule": "fed-alora", "optimizer_state": "keep"},
    "flexlora": {"ranks": [2, 4, 3]},
}


def environment():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*words):
    command = [*LAUNCH, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())


@pytest.fixture
def rows(even_rows):
    return even_rows


def shared(config):
    folder = Path(config.output) / "rounds" / "round-2"
    return load_file(folder / "shared.safetensors")


def log(config):
    return [json.loads(line) for line in (Path(config.output) / "rounds.jsonl").read_text().splitlines()]


def one_process_fails(config):
    """Both leave that training; its client has failed with the code of the process that failed, and they go on."""
    first, second = log(config)
    [(name, failed)] = first["failed"].items()
    assert failed["codes"] == ["out-of-memory"]
    assert first["counted"]
    assert second["counted"]
    assert name in second["clients"]
    text = (Path(config.output) / "clients" / name / "errors.log").read_text()
    assert "process 1 failed: MemoryError: a longer row than the other process has" in text


@pytest.mark.parametrize("rules", [RULES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_two_processes_give_the_result_of_one(rules, make_config, tmp_path):
    pairs, recipes = {}, []
    for name, given in rules.items():
        settings = {"rule": name, "adapter__lora_dropout": 0.0, **given}
        accumulated = settings.get("training__gradient_accumulation", 1)
        one = make_config(f"{name}-one", training__batch_size=8 // accumulated, **settings)
        two = make_config(f"{name}-two", training__batch_size=4 // accumulated, **settings)
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(dump_config(two))
        pairs[name] = one, two
    faulty = make_config("faulty", rule="fed-alora", training__batch_size=4, min_clients=2)
    if rules is RULES:
        recipes.append(tmp_path / "out-of-memory.yaml")
        recipes[-1].write_text(dump_config(faulty))
    done = launch(SCRIPT, *recipes)
    assert done.returncode == 0, done.stderr[-4000:]
    if rules is RULES:
        one_process_fails(faulty)
    for name, (one, two) in pairs.items():
        federate(one, progress=False)
        expected, found = shared(one), shared(two)
        assert expected.keys() == found.keys()
        for tensor in expected:
            assert (found[tensor] - expected[tensor]).abs().max() < 2e-5 * expected[tensor].abs().max(), (
                name,
                tensor,
            )
        for ours, theirs in zip(log(two), log(one), strict=True):
            assert ours["counted"]
            assert ours["clients"].keys() == theirs["clients"].keys()
            for client, expected_line in theirs["clients"].items():
                assert ours["clients"][client]["loss"] == pytest.approx(expected_line["loss"], rel=1e-4)


@pytest.fixture
def launched(monkeypatch):
    """As in the first of two processes that torchrun has started."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def refused(recipe, capsys, *words):
    assert main(["federate", str(recipe), *words]) == 2
    return capsys.readouterr().err


def test_what_does_not_go_with_several_processes(launched, make_config, tmp_path, capsys, monkeypatch):
    config = make_config()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config))
    assert "Set federation.workers=1" in refused(recipe, capsys, "--federation.workers=2")
    for engine in ("flower-sim", "flower"):
        text = refused(recipe, capsys, "--engine", engine)
        assert "2 processes were launched, but with Flower the server trains nothing" in text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "accelerate is configured for FSDP" in refused(recipe, capsys)
    assert main(["compare", "demo", f"--output={tmp_path / 'compared'}"]) == 2
    assert "only `train` and `federate` use more than one. Start compare without" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "nothing was written"


def test_the_number_of_processes_may_not_change(make_config, launched, monkeypatch):
    """A federation of one process, resumed by two; the check comes before they meet."""
    config = make_config(rounds=1)
    with monkeypatch.context() as alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            alone.delenv(name)
        federate(config, progress=False)
    monkeypatch.setattr(driver, "Group", lambda: None)
    with pytest.raises(CheckpointError, match="processes: 1 then, 2 now"):
        federate(config, resume="auto", progress=False)
