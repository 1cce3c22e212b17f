"""`verify` beside a live process: what that removes between two reads is no damage, and damage stays damage."""

import shutil

import pytest

from braidlora.runs import _verify, commit_directory, verify


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints."""
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        target = folder / "checkpoints" / f"step-{step}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with commit_directory(target) as staging:
            (staging / "identity.json").write_text("{}")
            (staging / "weights").write_text(str(step))
    return folder


def test_a_checkpoint_that_is_pruned_in_between(run, monkeypatch):
    check, gone = _verify.check_file, run / "checkpoints" / "step-1"

    def prune_first(path, entry):
        shutil.rmtree(gone, ignore_errors=True)
        check(path, entry)

    monkeypatch.setattr(_verify, "check_file", prune_first)
    report = verify(run)
    assert (report["damaged"], report["intact"]) == ([], 4)


def test_a_folder_that_is_gone_when_its_turn_comes(run, monkeypatch):
    read, gone = _verify.read_manifest, run / "checkpoints" / "step-3"

    def prune_first(folder):
        shutil.rmtree(gone, ignore_errors=True)
        return read(folder)

    monkeypatch.setattr(_verify, "read_manifest", prune_first)
    report = verify(run)
    assert (report["damaged"], report["intact"]) == ([], 4)


def test_damage_stays(run):
    (run / "checkpoints" / "step-2" / "weights").write_text("x")
    assert [one["file"] for one in verify(run)["damaged"]] == ["checkpoints/step-2/weights"]
