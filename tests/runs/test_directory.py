"""The run directory: atomic files, manifests, and places that are refused."""

import json
import os
import random
import subprocess
import sys

import pytest

from braidlora.errors import CheckpointError, ConfigError
from braidlora.runs import (
    MANIFEST,
    Committed,
    RunDirectory,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    environment,
    read_json,
)


@pytest.fixture
def folder(tmp_path):
    with commit_directory(tmp_path / "step-3") as staging:
        (staging / "weights.bin").write_bytes(bytes(range(256)) * 20)
        (staging / "sub").mkdir()
        (staging / "sub" / "state.json").write_text("{}")
    return tmp_path / "step-3"


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    atomic_write_json(path, {"mean": 1.5, "worst": None})
    assert json.loads(path.read_text()) == {"mean": 1.5, "worst": None}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(path, "new")
    assert json.loads(path.read_text()) == {"mean": 1.5, "worst": None}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_manifest_lists_every_file_and_verifies(folder):
    assert sorted(Committed(folder).verify()) == ["sub/state.json", "weights.bin"]
    assert Committed(folder).verify()["weights.bin"]["bytes"] == 5120


def test_a_failed_commit_leaves_the_target_as_it_was(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def fail():
        with commit_directory(folder) as staging:
            (staging / "weights.bin").write_bytes(b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["step-3"]


def test_a_commit_replaces_an_older_folder(folder):
    with commit_directory(folder) as staging:
        (staging / "other.bin").write_bytes(b"new")
    assert list(Committed(folder).verify()) == ["other.bin"]
    assert os.listdir(folder.parent) == ["step-3"]


@pytest.mark.parametrize("name", ["weights.bin", "sub/state.json", MANIFEST])
def test_every_flipped_bit_is_noticed(folder, name):
    path = folder / name
    original = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"changed since it was written|truncated"):
            Committed(folder).verify()
    path.write_bytes(original)
    Committed(folder).verify()


def test_verify_names_the_file(folder):
    (folder / "weights.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"weights\.bin: has 5 bytes, but 5120 were written"):
        Committed(folder).verify()
    (folder / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.bin: missing"):
        Committed(folder).verify()
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="the folder is incomplete"):
        Committed(folder).verify()
    with pytest.raises(CheckpointError, match="no such folder"):
        Committed(folder / "nowhere").verify()


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.json: missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"mean": 1')
    with pytest.raises(CheckpointError, match=r"a\.json: not readable as JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("output", ["../run", "runs/../../run", "/tmp/../etc/run"])
def test_parent_steps_are_refused(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"contains `\.\.`"):
        RunDirectory.at(output)
    assert os.listdir(tmp_path) == []


def test_links_that_lead_out_are_refused(tmp_path, monkeypatch):
    inside, outside = tmp_path / "work", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    monkeypatch.chdir(inside)
    (inside / "runs").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"through a link to .*elsewhere"):
        RunDirectory.at("runs/mine")
    with pytest.raises(ConfigError, match="is a link to"):
        RunDirectory.at(inside / "runs")
    assert os.listdir(outside) == []
    assert RunDirectory.at(outside / "mine").path == outside / "mine"  # an absolute path is taken at its word


@pytest.mark.parametrize("name", ["metrics.json", "log.jsonl", "adapter", "checkpoints/step-2"])
def test_links_inside_the_run_directory_are_refused(tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("precious")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(ConfigError, match=r"is a link to .*precious"):
        RunDirectory.at(tmp_path / "run")


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.at(tmp_path / "run")


def test_states_and_what_is_refused(tmp_path):
    run = RunDirectory.at(tmp_path / "run")
    assert run.state() == "new"
    run.path.mkdir()
    assert run.state() == "new"
    (run.path / "thesis.txt").write_text("x")
    assert run.state() == "foreign"
    with pytest.raises(ConfigError, match="not written by a run"):
        run.refuse_to_lose(resume=False, overwrite=True)
    (run.path / "config.yaml").write_text("x")
    assert run.state() == "started"
    run.refuse_to_lose(resume=False, overwrite=False)
    for step in (20, 100, 3):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".step-120.partial").mkdir()
    assert run.checkpoint_steps() == [3, 20, 100]
    assert run.state() == "resumable"
    with pytest.raises(CheckpointError, match=r"a run at step 100.*--resume auto.*--overwrite"):
        run.refuse_to_lose(resume=False, overwrite=False)
    run.metrics.write_text("{}")
    with pytest.raises(CheckpointError, match="a finished run"):
        run.refuse_to_lose(resume=False, overwrite=False)
    run.refuse_to_lose(resume=True, overwrite=False)
    run.remove_partial()
    assert sorted(os.listdir(run.checkpoints)) == ["step-100", "step-20", "step-3"]
    run.clear()
    assert os.listdir(run.path) == ["thesis.txt"]


def test_environment_is_json_and_imports_no_torch():
    text = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, sys; from braidlora.runs import environment; print(json.dumps(environment())); "
            "assert 'torch' not in sys.modules",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    told = json.loads(text)
    assert set(told) == {"versions", "machine", "threads", "date"}
    assert told["threads"] is None
    assert told["versions"]["torch"]
    import torch

    assert environment()["threads"] == torch.get_num_threads()
