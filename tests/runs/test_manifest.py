"""What is read is what was checked: one opening, the bytes that were hashed, and no file that is quietly left out."""

import json
import os

import pytest

from braidlora.errors import CheckpointError, TrainingError
from braidlora.runs import (
    MANIFEST,
    Committed,
    IncompleteError,
    commit_directory,
    cover,
    covered,
    damages,
    read_covered,
    refuse_changed,
    uncover,
)


@pytest.fixture
def folder(tmp_path):
    with commit_directory(tmp_path / "step-1") as staging:
        (staging / "state.json").write_text('{"step": 1}')
        (staging / "weights").write_bytes(bytes(range(256)))
    return tmp_path / "step-1"


def test_a_file_that_is_swapped_after_the_check_is_not_read(folder):
    found = Committed(folder)
    found.verify()
    assert found.read_json("state.json") == {"step": 1}
    (folder / "state.json").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match=r"state\.json: sha256"):
        found.read("state.json")
    with pytest.raises(CheckpointError, match=r"state\.json: sha256"), found.copy(("state.json",)):
        pass


def test_a_whole_folder_that_is_swapped_after_the_check_is_not_read(folder):
    """Its own manifest fits; the one that was read does not."""
    found = Committed(folder)
    with commit_directory(folder) as staging:
        (staging / "state.json").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match=r"state\.json: sha256"):
        found.read("state.json")
    with pytest.raises(IncompleteError, match="weights: missing"):
        found.read("weights")


def test_missing_and_unlisted_files_are_errors(folder):
    (folder / "more").write_text("planted")
    found = Committed(folder)
    assert not found.lists("more")
    with pytest.raises(IncompleteError, match=r"more: not listed in manifest\.json"):
        found.read("more")
    (folder / "weights").unlink()
    assert found.lists("weights")
    with pytest.raises(IncompleteError, match="weights: missing"):
        found.read("weights")
    with pytest.raises(IncompleteError, match="weights: missing"), found.copy(("state.json", "weights")):
        pass


def test_a_copy_is_private_and_goes(folder):
    with Committed(folder).copy(("state.json", "none")) as copy:
        assert os.listdir(copy) == ["state.json"]
        assert os.stat(copy).st_mode & 0o077 == 0
        (folder / "state.json").write_text("changed")
        assert (copy / "state.json").read_text() == '{"step": 1}'
    assert not copy.exists()


def test_a_full_temporary_folder_is_told(folder, monkeypatch):
    def full(self, name, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Committed, "_copy", full)
    with pytest.raises(TrainingError, match=r"No space left.*TMPDIR"), Committed(folder).copy(("weights",)):
        pass


def test_without_a_manifest(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(IncompleteError, match="the folder is incomplete"):
        Committed(folder)
    assert Committed(folder, needs_manifest=False).read_json("state.json") == {"step": 1}


def test_a_growing_directory_is_covered_file_by_file(tmp_path):
    assert covered(tmp_path) is None
    (tmp_path / "config.yaml").write_text("seed: 1")
    cover(tmp_path, ["config.yaml"], {"metrics.json": b"{}"})
    assert sorted(covered(tmp_path)) == ["config.yaml", "metrics.json"]
    assert list(damages(tmp_path)) == ["metrics.json"]
    (tmp_path / "metrics.json").write_text("{}")
    assert refuse_changed(tmp_path) == []
    (tmp_path / "log.jsonl").write_text("a line")  # nothing is known of it
    assert read_covered(tmp_path, "log.jsonl") == b"a line"
    (tmp_path / "config.yaml").write_text("seed: 2")
    with pytest.raises(CheckpointError, match=r"config\.yaml: changed since it was written"):
        read_covered(tmp_path, "config.yaml")
    with pytest.raises(CheckpointError, match="Restore the original, or remove it"):
        refuse_changed(tmp_path)
    uncover(tmp_path, "config")
    assert read_covered(tmp_path, "config.yaml") == b"seed: 2"
    (tmp_path / "metrics.json").unlink()
    assert [str(error) for error in refuse_changed(tmp_path)] == [
        f"{tmp_path / 'metrics.json'}: missing, although the manifest lists it."
    ]
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(json.dumps(json.loads(text)))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        covered(tmp_path)
