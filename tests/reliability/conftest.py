"""One world for all tests here, and each verb's undisturbed outcome in it, found once."""

import shutil
import warnings

import pytest
from fault_injection import Faults
from small_world import World

import braidlora.comparison.run
import braidlora.federated.simulation.driver
import braidlora.one_run  # noqa: F401 (imported before the first fault)
from braidlora.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def call(capsys):
    """Exit code and stderr of a command; an exception is what a user would see as a traceback, and fails the test."""

    def called(words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(words)
        return code, capsys.readouterr().err

    return called


@pytest.fixture(scope="session")
def known():
    return {}


@pytest.fixture
def undisturbed(world, known, call):
    """By verb: what was there before it, the places of its operations by kind, and its undisturbed results."""

    def found(verb):
        if verb not in known:
            scene = world.scenes()[verb]
            world.set(None)
            for words in scene.before:
                code, error = call(words)
                assert code == 0, error
            stage = world.folder / f"stage-{verb}"
            shutil.copytree(world.work, stage)
            places = {}
            for kind in ("disk", "memory") if scene.memory else ("disk",):
                world.set(stage)
                with Faults(kind).active() as faults:
                    code, error = call(scene.verb)
                assert code == 0, error
                places[kind] = faults.places
            known[verb] = stage, places, world.results(scene.results)
        return known[verb]

    return found
