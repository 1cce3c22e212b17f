"""SIGKILL at any moment, also during a save: the resumed run ends with the same bytes (faults.md 10)."""

import random

import pytest

from helpers.kills import Uninterrupted, drawn_kills, kill_and_resume
from helpers.results import run_bytes


def kill_config(make_config, output):
    return make_config(output, split__validation=0.1, training__gradient_accumulation=1)


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def whole(known, make_config, in_child, tmp_path):
    """The run that nothing interrupts."""
    if not known:
        config = kill_config(make_config, "whole")
        known["run"] = Uninterrupted.of(config, in_child, run_bytes, tmp_path / "events.json")
    return known["run"]


def test_five_kills_one_during_a_save(whole, make_config, in_child):
    draw = random.Random(20)
    events = range(1, len(whole.events) + 1)
    kills = [
        draw.choice(events[:12]),  # before there is a checkpoint
        *draw.sample(events, 2),
        draw.choice(whole.numbers("torch.save")),  # a checkpoint is half written
        random.uniform(0.1, 0.8)
        * whole.seconds,  # without a hook in the process, at another moment every time
    ]
    for number, kill in enumerate(kills):
        config = kill_config(make_config, f"killed-{number}")
        kill_and_resume(config, [kill], in_child)
        assert run_bytes(config.output) == whole.results, kill


@pytest.mark.slow
def test_fifty_kills(whole, make_config, in_child):
    draw = random.Random(50)
    for number in range(50):
        kills = drawn_kills(number, draw, whole, often=whole.numbers("torch.save"), ending=60)
        config = kill_config(make_config, f"killed-{number}")
        kill_and_resume(config, kills, in_child)
        assert run_bytes(config.output) == whole.results, kills
