"""Whatever write, rename, sync or allocation fails: a documented exit, nothing lost, and the next start ends the same.

The default form tries some of the operations of every verb, the slow one all of them, each once as a passing fault and
once as a disk that stays full.
"""

import contextlib
import os
import random
import shutil
import warnings

import pytest
import torch
from fault_injection import Faults
from small_world import World

import braidlora.comparison.run
import braidlora.federated.local
import braidlora.training.run  # noqa: F401 (imported before the first fault)
from braidlora.cli import main
from braidlora.errors import CheckpointError
from braidlora.runs import verify

torch.set_num_threads(1)
REMEDIES = ("Free space", "free space", "training.batch_size", "evaluation.batch_size", "batch_size")
VERBS = (
    "train", "resume", "overwrite", "evaluate", "compare", "report", "federate", "add-client", "export", "export-over",
    "merge", "analyze", "study",
)  # fmt: skip
_WITH_A_MODEL = (
    "train",
    "resume",
    "overwrite",
    "evaluate",
    "compare",
    "federate",
    "add-client",
    "merge",
    "study",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def known():
    """By verb: what stood there before it, its operations by kind, and what it leaves when nothing fails."""
    return {}


def call(words, capsys):
    """Exit code and stderr; anything but a documented exit is raised here, as the traceback that a user would see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(words)
    return code, capsys.readouterr().err


def undisturbed(world, known, verb, capsys):
    if verb not in known:
        scene = world.scenes()[verb]
        world.set(None)
        for words in scene.before:
            assert call(words, capsys)[0] == 0
        stage = world.folder / f"stage-{verb}"
        shutil.copytree(world.work, stage)
        counts = {}
        for kind in ("disk", "memory") if scene.memory else ("disk",):
            world.set(stage)
            with Faults(kind).active() as faults:
                code, error = call(scene.verb, capsys)
            assert code == 0, error
            counts[kind] = len(faults.operations)
        known[verb] = stage, counts, world.results(scene.results)
        with contextlib.suppress(CheckpointError):
            assert verify(world.work)["damaged"] == []
    return known[verb]


def one_fault(world, known, verb, kind, number, stays, capsys):
    stage, _, expected = undisturbed(world, known, verb, capsys)
    scene = world.scenes()[verb]
    world.set(stage)
    with Faults(kind, number, stays=stays).active() as faults:
        code, error = call(scene.verb, capsys)
    where = f"{verb}, {kind} {number} of {len(faults.operations)} ({faults.operations[number - 1 : number]}): {error}"
    assert code in ((0, 4, 6) if verb == "federate" else (0, 4)), where
    if code:
        assert any(remedy in error for remedy in REMEDIES), where
    with contextlib.suppress(CheckpointError):  # nothing stands there yet
        assert verify(world.work)["damaged"] == [], where
    code, error = call(scene.again or scene.verb, capsys)
    if code == 2 and "holds an earlier export" in error:  # the fault came after the export was whole
        code = 0
    assert code == 0, f"again after {where}: {error}"
    assert world.results(scene.results) == expected, where
    assert verify(world.work)["damaged"] == [], where


def some_of(count, verb, kind):
    draw = random.Random(f"{verb} {kind}")
    return sorted({count, *draw.sample(range(1, count + 1), min(count, 3))})


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """Nothing here pulls the plug; a sync takes no time, and can fail all the same."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("verb", VERBS)
def test_some_operations_fail(world, known, verb, capsys):
    _, counts, _ = undisturbed(world, known, verb, capsys)
    for kind, count in counts.items():
        for number in some_of(count, verb, kind):
            one_fault(world, known, verb, kind, number, bool(number % 2) and kind == "disk", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("stays", [False, True], ids=["passing", "staying"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_operation_fails(world, known, verb, stays, capsys):
    _, counts, _ = undisturbed(world, known, verb, capsys)
    for number in range(1, counts["disk"] + 1):
        one_fault(world, known, verb, "disk", number, stays, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("verb", _WITH_A_MODEL)
def test_every_allocation_fails(world, known, verb, capsys):
    _, counts, _ = undisturbed(world, known, verb, capsys)
    for number in range(1, counts["memory"] + 1):
        one_fault(world, known, verb, "memory", number, False, capsys)
