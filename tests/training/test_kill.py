"""SIGKILL at any moment, also inside a save: the resumed run ends with the same bytes (faults.md 10)."""

import json
import random

import pytest
from training_child import result_bytes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_base, rows, in_child):
    """Result bytes of a run that nothing interrupts, and the events that a kill can hit."""
    return {}


def kill_config(make_config, output):
    return make_config(output, split__validation=0.1, training__gradient_accumulation=1)


def reference(uninterrupted, make_config, in_child, tmp_path):
    if not uninterrupted:
        events = tmp_path / "events.json"
        outcome = in_child(kill_config(make_config, "whole"), count_events=str(events))
        assert outcome.code == 0, outcome.output
        uninterrupted["bytes"] = result_bytes(tmp_path / "whole")
        uninterrupted["events"] = json.loads(events.read_text())
    return uninterrupted


def killed_and_resumed(config, kills, in_child):
    for kill_at in kills:
        outcome = in_child(config, resume="auto", kill_at=kill_at)
        assert outcome.code == -9, outcome.output
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output
    return result_bytes(config.output)


def inside_a_save(events):
    """Points between the first torch.save of a checkpoint and its rename."""
    return [index + 1 for index, name in enumerate(events) if name == "torch.save"]


def test_five_kills_one_inside_a_save(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(20)
    points = [*draw.sample(range(2, len(whole["events"])), 4), draw.choice(inside_a_save(whole["events"]))]
    for number, point in enumerate(points):
        config = kill_config(make_config, f"killed-{number}")
        assert killed_and_resumed(config, [point], in_child) == whole["bytes"], (
            point,
            whole["events"][point - 1],
        )


@pytest.mark.slow
def test_fifty_kills(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(50)
    saves = inside_a_save(whole["events"])
    points = [
        draw.choice(saves) if number % 5 == 0 else draw.randrange(2, len(whole["events"]))
        for number in range(50)
    ]
    for number, point in enumerate(points):
        config = kill_config(make_config, f"killed-{number}")
        # Every third run is killed a second time, soon after it was resumed.
        kills = (
            [point, draw.randrange(2, 30)]
            if number % 3 == 0 and point < len(whole["events"]) - 60
            else [point]
        )
        assert killed_and_resumed(config, kills, in_child) == whole["bytes"], kills
