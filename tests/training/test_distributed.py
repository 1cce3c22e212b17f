"""`accelerate launch` on two CPU processes gives the loss curve of one."""

import json
import os
import subprocess
import sys

import pytest

from braidlora.config import dump_config
from braidlora.one_run import train
from braidlora.runs import Committed

CURVE = {
    "adapter__lora_dropout": 0.0,  # each process draws masks of its own
    "training__logging_steps": 1, "training__epochs": 1, "training__save_steps": 3, "split__validation": 0.1,
    "training__eval_steps": 4,
}  # fmt: skip


def launch(recipe, *arguments):
    # `--cpu` makes accelerate start one process unless there is MPI; `--multi_gpu` starts several, and without a GPU
    # in sight they are CPU processes that talk over gloo.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", "0", "-m", "braidlora", "train", str(recipe), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def curve(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_two_processes_have_the_curve_of_one(make_config, tmp_path):
    one = make_config("one", training__batch_size=8, **CURVE)
    two = make_config("two", training__batch_size=4, **CURVE)
    train(one, progress=False)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(dump_config(two))
    done = launch(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Run directory") == 1, "one process tells"
    expected, found = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for key in set(ours) - {"timing"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (key, ours)
    for folder in (tmp_path / "two" / "checkpoints").iterdir():
        assert {"rng_state_0.pth", "rng_state_1.pth", "progress_1.json"} <= set(Committed(folder).verify())
    assert set(json.loads((tmp_path / "two" / "metrics.json").read_text())["tasks"]) == {"up", "rev", "len"}


@pytest.mark.slow
def test_two_processes_resume(make_config, tmp_path):
    import shutil

    recipes = {}
    for name in ("whole", "parts"):
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(
            dump_config(make_config(name, training__batch_size=4, **{**CURVE, "adapter__lora_dropout": 0.1}))
        )
        done = launch(recipes[name])
        assert done.returncode == 0, done.stderr[-3000:]
    directory = tmp_path / "parts"
    shutil.rmtree(directory / "checkpoints" / "step-8")
    (directory / "metrics.json").unlink()
    done = launch(recipes["parts"], "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    weights = "adapter/adapter_model.safetensors"
    assert (directory / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
