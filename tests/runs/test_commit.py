"""A folder that replaces another: at every moment the old one or the new one stands there, or can be put back."""

import os
import signal

import pytest

from braidlora.runs import Committed, commit_directory, remove_leftovers, restore_all
from braidlora.runs import _commit as commit


def replace_and_die(target, die_at, exchanged):
    """In a fork: replace `target`, and at the `die_at`-th operation on the file system die as by `kill -9`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        count = 0

        def dying(function):
            def called(*arguments, **options):
                nonlocal count
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return called

        for name in ("replace", "fsync", "open", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        commit.exchange = dying(commit.exchange) if exchanged else lambda one, other: False
        committed(target, "new")
        os._exit(0)
    finally:
        os._exit(1)


def committed(target, text):
    with commit_directory(target) as staging:
        (staging / "file").write_text(text)
    return target


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "two renames"])
def test_a_kill_at_every_operation_loses_nothing(tmp_path, exchanged):
    for number in range(1, 60):
        target = committed(tmp_path / str(number) / "target", "old")
        status = replace_and_die(target, number, exchanged)
        assert status in (0, signal.SIGKILL)
        if exchanged:  # there is no moment without the folder, also before anything is put back
            Committed(target).verify()
        restore_all(target.parent)
        Committed(target).verify()
        assert (target / "file").read_text() in ("old", "new")
        committed(target, "newer")
        if status == 0:
            assert os.listdir(target.parent) == ["target"]
            assert number > 8
            return
    raise AssertionError("the replacement has more operations than were tried")


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("operation", ["replace", "fsync", "open", "exchange"])
def test_every_failing_operation_leaves_the_old_folder(tmp_path, monkeypatch, exchanged, operation):
    """The second rename too, which once lost the folder; a failure is reported, and what stood there stands there."""
    if not exchanged:
        monkeypatch.setattr(commit, "exchange", lambda one, other: False)
    target = committed(tmp_path / "target", "old")
    owner = commit if operation == "exchange" else os
    original, failures = getattr(owner, operation), 0
    for number in range(1, 40):
        count = 0

        def failing(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:  # noqa: B023 (called in this turn only)
                raise OSError(28, "No space left on device")
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, failing)
            try:
                committed(target, "new")
            except OSError:
                failures += 1
            else:
                assert (target / "file").read_text() == "new"
                if count < number:
                    break
                # What failed was the removal of the old folder, which is swept up by the next start.
                remove_leftovers(tmp_path)
                restore_all(tmp_path)
                assert os.listdir(tmp_path) == ["target"]
                committed(target, "old")
                continue
        assert (target / "file").read_text() == "old"
        Committed(target).verify()
        assert os.listdir(tmp_path) == ["target"]
    assert failures >= 1
    assert (target / "file").read_text() == "new"


def test_a_new_folder_is_taken_back_when_it_cannot_be_synced(tmp_path, monkeypatch):
    def full(directory):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(commit, "sync_directory", full)
        with pytest.raises(OSError, match="Input/output error"):
            committed(tmp_path / "target", "new")
    assert os.listdir(tmp_path) == []


def test_names_that_are_long_and_wide(tmp_path):
    committed(tmp_path / ("ü" * 120), "x")
