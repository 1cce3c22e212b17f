"""`federate` under torchrun: two CPU processes train each client together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from braidlora.config import dump_config
from braidlora.federated.simulation.driver import federate
from helpers.tiny_base import write_rows

SCRIPT = Path(__file__).parents[1] / "group_process.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RULES = {
    "fed-alora": {},
    "fedit": {"proximal_mu": 0.5},
    "flora": {},
    "fedsa-lora": {"optimizer_state": "keep", "training__gradient_accumulation": 2},
    "classify": {
        "kind": "classify",
        "rule": "fed-alora",
        "optimizer_state": "keep",
        "adapter__lora_dropout": 0.0,
    },
}


def environment():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*words):
    command = [*LAUNCH, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())


@pytest.fixture(scope="module")
def even_rows(tmp_path_factory):
    """24, 16 and 8 training rows: whole steps of 8, so that no process has to repeat rows to fill one."""
    return write_rows(tmp_path_factory.mktemp("even"), (30, 20, 10), lengths=False)


@pytest.fixture
def rows(even_rows):
    return even_rows


def shared(config):
    folder = Path(config.output) / "rounds" / "round-2"
    return load_file(folder / "shared.safetensors")


def log(config):
    return [json.loads(line) for line in (Path(config.output) / "rounds.jsonl").read_text().splitlines()]


def test_two_processes_give_the_result_of_one(make_config, tmp_path):
    pairs, recipes = {}, []
    for name, given in RULES.items():
        settings = {"rule": name, "adapter__lora_dropout": 0.0, **given}
        one = make_config(f"{name}-one", training__batch_size=8, **settings)
        two = make_config(f"{name}-two", training__batch_size=4, **settings)
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(dump_config(two))
        pairs[name] = one, two
    done = launch(SCRIPT, *recipes)
    assert done.returncode == 0, done.stderr[-4000:]
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
