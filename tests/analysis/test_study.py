"""The study through the command line: groups of pairs, steps, resume, refusals."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from scipy.linalg import subspace_angles

from braidlora.analysis.study import single_task_config
from braidlora.cli import main
from braidlora.config import RunConfig, load_config

SEEDS = (3, 4)
TASKS = ("up", "len")


@pytest.fixture(scope="module")
def recipe_file(recipe, tmp_path_factory):
    made = recipe()
    made["training"] = {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 50}
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def command(recipe_file, output):
    return [
        "analyze", "study", str(recipe_file), "--tasks=up,len", "--seeds=3,4", "--output", str(output),
        "--adapter.num_experts=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(recipe_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "study"
    assert main(command(recipe_file, output)) == 0
    return output, json.loads((output / "analysis.json").read_text())


def test_every_task_from_every_seed_for_as_many_steps(done):
    output, written = done
    study = written["study"]
    labels = [f"{task}-seed{seed}" for task in TASKS for seed in SEEDS]
    assert list(study["runs"]) == labels
    # 40 and 16 rows: 28 on average, 4 epochs, batches of 8; warm-up and first checkpoint after a tenth of them.
    assert (study["steps"], study["warmup_steps"]) == (14, 1)
    for label in labels:
        config = load_config(output / "runs" / label / "config.yaml")
        training = config.training
        assert (training.max_steps, training.warmup_steps, training.save_steps) == (14, 1, 2)
        assert config.adapter.method == "lora"
        assert [task.name for task in config.tasks] == [label.split("-")[0]]
        assert study["runs"][label]["last_loss"] < study["runs"][label]["first_loss"]
        assert json.loads((output / "runs" / label / "metrics.json").read_text())["tasks"] == {}


def test_one_seed_gives_one_start(done):
    start = done[1]["study"]["start"]["A"]["groups"]
    # Whether svdvals(QᵀQ) gives 1 or the number below it depends on the processor's LAPACK kernels.
    assert start["different_tasks_same_seed"] == pytest.approx({"mean": 1.0, "std": 0.0, "n": 2}, abs=1e-14)
    assert start["same_task_different_seeds"]["mean"] < 0.3


def test_the_groups_against_scipy(done):
    output, written = done
    end = written["study"]["end"]
    members = list(itertools.product(TASKS, SEEDS))
    for factor in "AB":
        sums = {
            "different_tasks_same_seed": [],
            "same_task_different_seeds": [],
            "different_tasks_different_seeds": [],
        }
        name = end[factor]["layers"][1]["name"]
        for (task, seed), (other_task, other_seed) in itertools.combinations(members, 2):
            X, Y = (
                load_file(output / "runs" / f"{t}-seed{s}" / "adapter" / "adapter_model.safetensors")[
                    f"base_model.model.{name}.lora_{factor}.weight"
                ].double().numpy()
                for t, s in ((task, seed), (other_task, other_seed))
            )  # fmt: skip
            X, Y = (X.T, Y.T) if factor == "A" else (X, Y)
            tasks = "same_task" if task == other_task else "different_tasks"
            seeds = "same_seed" if seed == other_seed else "different_seeds"
            sums[f"{tasks}_{seeds}"].append(np.mean(np.cos(subspace_angles(X, Y)) ** 2))
        assert [len(values) for values in sums.values()] == [2, 2, 2]
        for group, values in sums.items():
            found = end[factor]["layers"][1]["groups"][group]
            assert found["mean"] == pytest.approx(np.mean(values), rel=1e-4)
            assert found["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-3)
            assert found["n"] == 2
    assert end["A"]["chance"] == pytest.approx(4 / 64)


def test_drift_and_verdict(done):
    study = done[1]["study"]
    assert study["drift"]["since_start"]["B"]["direction"] is None
    assert study["drift"]["since_warmup"]["from"] == "step-2"
    assert study["drift"]["since_warmup"]["delta"]["direction"]["n"] == 4
    assert len(study["drift"]["since_warmup"]["layers"]) == 4
    A = study["drift"]["since_start"]["A"]["direction"]["mean"]
    assert f"since the start is {A:.3f} ±" in study["verdict"]["b_takes_the_direction"]["text"]


def test_the_figures(done):
    output, written = done
    names = ["study-similarity", "study-drift", "study-matrix"]
    assert [figure["name"] for figure in written["figures"]] == names
    for name in names:
        assert (output / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (output / f"{name}.svg").read_text()


def without_dates(written):
    return {key: value for key, value in written.items() if key not in ("environment", "command")}


def test_a_study_that_was_stopped_ends_with_the_same_numbers(done, recipe_file, tmp_path, monkeypatch):
    """One run finished, one stopped after its last checkpoint but one, two not begun."""
    output, written = done
    shutil.copytree(output / "runs" / "up-seed3", tmp_path / "study" / "runs" / "up-seed3")
    begun = tmp_path / "study" / "runs" / "up-seed4"
    shutil.copytree(output / "runs" / "up-seed4", begun)
    (begun / "metrics.json").unlink()
    shutil.rmtree(begun / "adapter")
    shutil.rmtree(begun / "checkpoints" / "step-14")
    finished = (tmp_path / "study" / "runs" / "up-seed3" / "metrics.json").stat().st_mtime_ns
    assert main([*command(recipe_file, tmp_path / "study"), "--json"]) == 0
    again = json.loads((tmp_path / "study" / "analysis.json").read_text())
    assert (tmp_path / "study" / "runs" / "up-seed3" / "metrics.json").stat().st_mtime_ns == finished
    for study in (written["study"], again["study"]):
        for run in study["runs"].values():
            run.pop("directory", None)
    assert without_dates(again) == without_dates(written)


@pytest.mark.slow
def test_a_study_that_was_killed_ends_with_the_same_numbers(done, recipe_file, tmp_path):
    _, written = done
    words = [sys.executable, "-m", "braidlora", *command(recipe_file, tmp_path / "study"), "--json"]
    child = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "study" / "runs" / "up-seed4" / "checkpoints" / "step-2"
    while not checkpoint.is_dir():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "study" / "analysis.json").exists()
    subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
    again = json.loads((tmp_path / "study" / "analysis.json").read_text())
    assert again["study"]["end"] == written["study"]["end"]
    assert again["study"]["drift"] == written["study"]["drift"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--seeds=3"], 2, "--seeds: got 3; the study compares different seeds"),
        (["--seeds=3,x"], 2, "--seeds: got 'x'; expected non-negative integers"),
        (["--seeds="], 2, "--seeds: got ''; expected names separated by commas"),
        (
            ["--tasks=up"],
            2,
            "--tasks: got up; the study compares different tasks, so name at least two of up, rev, len",
        ),
        (["--tasks=up,down"], 2, "unknown task down; those with training rows are up, rev, len"),
        (["--gradients"], 2, "--gradients does not apply to a study"),
        (["--adapter.method={peft_type: LOHA, r: 4}"], 2, "add --adapter.method=lora"),
        (["--model.path=./nowhere"], 2, "no such folder './nowhere'"),
    ],
)
def test_what_a_study_refuses(words, code, says, recipe_file, tmp_path, capsys):
    assert main(["analyze", "study", str(recipe_file), "--output", str(tmp_path / "study"), *words]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_another_recipe_in_the_same_folder_is_refused(done, recipe_file, capsys):
    output, _ = done
    before = (output / "analysis.json").read_bytes()
    assert main([*command(recipe_file, output), "--training.learning_rate=0.5"]) == 5
    assert "belongs to another run" in capsys.readouterr().err
    assert (output / "analysis.json").read_bytes() == before


def test_a_study_needs_one_recipe(capsys):
    assert main(["analyze", "study"]) == 2
    assert "expected one recipe, got none" in capsys.readouterr().err


def test_settings_of_the_recipe_are_kept_and_those_for_mixtures_dropped(recipe, tmp_path):
    made = recipe(
        mixing={"strategy": "weights", "weights": {"up": 1, "rev": 2, "len": 3}},
        evaluation={"references": {"up": 50.0}},
        split={"validation": 0.2, "test": 0.2},
    )
    made["adapter"] |= {"router_temperature": 2.0, "r": 5, "lora_alpha": 10}
    made["training"] |= {"load_best": True}
    single = single_task_config(RunConfig.model_validate(made), "rev", 7, 200, tmp_path)
    assert (single.adapter.method, single.adapter.r, single.adapter.lora_alpha) == ("lora", 5, 10)
    assert single.adapter.router_temperature == 1.0
    assert single.training.learning_rate == 0.01
    assert (single.training.max_steps, single.training.warmup_steps, single.training.save_steps) == (
        200,
        3,
        20,
    )
    assert (single.split.validation, single.split.test, single.evaluation.references) == (0.0, 0.0, {})
    assert (single.seed, single.output) == (7, str(tmp_path / "runs" / "rev-seed7"))
