"""Whatever write, rename, sync or allocation fails: a documented exit, nothing lost, and the next start ends the same.

The default form tries some of the operations of every verb, the slow one the first and the last from every place in the
program, each once as a transient fault and once as a disk that stays full.
"""

import contextlib
import random

import pytest
from fault_injection import Faults, at_every_place
from small_world import FILES, VERBS

from braidlora.errors import CheckpointError
from braidlora.runs import verify

REMEDIES = ("Free space", "free space", "training.batch_size", "evaluation.batch_size", "batch_size")
DONE = (
    "contains an earlier export",
    "is not overwritten",
)  # what stands there is whole, and is compared below
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


@pytest.fixture
def one_fault(world, undisturbed, call):
    """Let one operation of a verb fail, look at what is left, and start again."""

    def tried(verb, kind, number, stays):
        stage, _, expected = undisturbed(verb)
        scene = world.scenes()[verb]
        world.set(stage)
        with Faults(kind, number, stays=stays).active() as faults:
            code, error = call(scene.verb)
        where = f"{verb}, {kind} {number} ({faults.operations[number - 1 : number]}), stays {stays}: {error}"
        assert code in ((0, 4, 6) if verb == "federate" else (0, 4)), where
        if code:
            assert any(remedy in error for remedy in REMEDIES), where
        with contextlib.suppress(CheckpointError):  # nothing stands there yet
            assert verify(world.work)["damaged"] == [], where
        code, error = call(scene.again or scene.verb)
        if code == 2 and any(
            words in error for words in DONE
        ):  # the fault changed nothing, or came after the end
            code = 0
        assert code == 0, f"again after {where}: {error}"
        assert world.results(scene.results) == expected, where
        assert verify(world.work)["damaged"] == [], where

    return tried


def some_of(count, verb, kind):
    """Two of the disk's operations and one of the model's, others for every verb."""
    draw = random.Random(f"{verb} {kind}")
    return draw.sample(range(1, count + 1), min(count, 2 if kind == "disk" else 1))


@pytest.mark.parametrize("verb", VERBS)
def test_some_operations_fail(undisturbed, one_fault, verb):
    _, places, _ = undisturbed(verb)
    for kind, operations in places.items():
        for number in some_of(len(operations), verb, kind):
            one_fault(verb, kind, number, bool(number % 2) and kind == "disk")


@pytest.mark.slow
@pytest.mark.parametrize("stays", [False, True], ids=["passing", "staying"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_operation_at_every_place_fails(undisturbed, one_fault, verb, stays):
    _, places, _ = undisturbed(verb)
    for number in at_every_place(places["disk"]):
        one_fault(verb, "disk", number, stays)


@pytest.mark.slow
@pytest.mark.parametrize("verb", _WITH_A_MODEL)
def test_an_allocation_at_every_place_fails(undisturbed, one_fault, verb):
    _, places, _ = undisturbed(verb)
    for number in at_every_place(places["memory"]):
        one_fault(verb, "memory", number, False)


@pytest.mark.parametrize("stays", [False, True], ids=["passing", "staying"])
@pytest.mark.parametrize("verb", FILES)
def test_a_file_is_the_old_one_or_the_new_one(world, undisturbed, call, verb, stays):
    """Replacing a file: whatever fails, the user has one of the two, and the next start gives the new one."""
    stage, places, expected = undisturbed(verb)
    scene = world.scenes()[verb]
    world.set(stage)
    old = world.results(scene.results)
    [replaced] = [name for name in expected if old[name] != expected[name]]
    for number in at_every_place(places["disk"]):
        world.set(stage)
        with Faults("disk", number, stays=stays).active() as faults:
            code, error = call(scene.verb)
        where = f"{verb}, disk {number} ({faults.operations[number - 1 : number]}), stays {stays}: {error}"
        assert code in (0, 4), where
        assert world.results(scene.results)[replaced] in (old[replaced], expected[replaced]), where
        code, error = call(scene.verb)
        assert code == 0, f"again after {where}: {error}"
        assert world.results(scene.results) == expected, where
