"""While a verb is at work, any verb that wants to write there is refused, and the first one's result is its own."""

import os
import sys
import time
import warnings

import pytest
from small_world import VERBS

from braidlora.cli import main
from braidlora.runs import _lock

# What else a second person may want to start while the verb of the key is running.
OTHERS = {
    "train": ("overwrite", "evaluate_top"),
    "resume": ("train",),
    "federate": ("add-client", "train"),
    "compare": ("train",),
    "export-over": ("merge",),
}


@pytest.fixture
def start(world):
    """Start a command in a fork; with `until` it keeps its lock until that file is there."""

    def started(words, said, until=None):
        child = os.fork()
        if child:
            return child
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, buffering=1) for number in (1, 2))
            if until is not None:
                leave = _lock._leave

                def late(path):
                    end = time.monotonic() + 120
                    while not until.exists() and time.monotonic() < end:
                        time.sleep(0.02)
                    leave(path)

                _lock._leave = late
            warnings.simplefilter("ignore")  # pytest makes errors of them
            os._exit(main(words))
        finally:
            os._exit(1)

    return started


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def locks(folder):
    return [path for path in folder.rglob(f"*{_lock.LOCK}") if _lock._holder(path) is not None]


def commands(world, verb):
    scenes = world.scenes()
    again = [scenes[verb].verb]
    for other in OTHERS.get(verb, ()):
        if other == "evaluate_top":
            again.append(["evaluate", str(world.work / "out")])
        elif other in scenes:
            again.append(scenes[other].verb)
    return again


@pytest.mark.parametrize("verb", VERBS)
def test_the_second_one_is_refused(world, undisturbed, start, verb, tmp_path):
    stage, _, expected = undisturbed(verb)
    scene = world.scenes()[verb]
    world.set(stage)
    first = start(scene.verb, tmp_path / "first", until=tmp_path / "go")
    end = time.monotonic() + 120
    while not locks(world.work) and time.monotonic() < end:
        time.sleep(0.02)
    assert locks(world.work)
    for number, words in enumerate(commands(world, verb)):
        if words[0] == "evaluate" and not (world.work / "out" / "adapter").is_dir():
            continue
        second = start(words, tmp_path / f"second-{number}")
        assert code_of(second) == 5, (tmp_path / f"second-{number}").read_text()
        assert f"process {first} on " in (tmp_path / f"second-{number}").read_text()
    (tmp_path / "go").touch()
    assert code_of(first) == 0, (tmp_path / "first").read_text()
    assert world.results(scene.results) == expected
    assert locks(world.work) == []
