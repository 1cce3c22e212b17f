"""SIGKILL at any moment, also inside a save: the resumed run ends with the same bytes (faults.md 10)."""

import json
import random
import time

import pytest
from training_child import result_bytes


@pytest.fixture(scope="module")
def uninterrupted():
    """Result bytes of a run that nothing interrupts, how long it takes, and the events that a kill can hit."""
    return {}


def kill_config(make_config, output):
    return make_config(output, split__validation=0.1, training__gradient_accumulation=1)


def reference(uninterrupted, make_config, in_child, tmp_path):
    if not uninterrupted:
        events = tmp_path / "events.json"
        in_child(kill_config(make_config, "first"))  # starts the process that forks
        start = time.monotonic()
        outcome = in_child(kill_config(make_config, "whole"), count_events=str(events))
        assert outcome.code == 0, outcome.output
        uninterrupted["seconds"] = time.monotonic() - start
        uninterrupted["bytes"] = result_bytes(tmp_path / "whole")
        uninterrupted["events"] = json.loads(events.read_text())
    return uninterrupted


def killed_and_resumed(config, kills, in_child):
    """Kill the run at each point of `kills`, an event by number or a moment in seconds, then let it end."""
    for kill in kills:
        if isinstance(kill, float):
            outcome = in_child(
                config, resume="auto", while_running=lambda child, after=kill: kill_after(child, after)
            )
            assert outcome.code in (-9, 0), outcome.output  # it may have been faster
        else:
            outcome = in_child(config, resume="auto", kill_at=kill)
            assert outcome.code == -9, outcome.output
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output
    return result_bytes(config.output)


def kill_after(child, seconds):
    child.join(seconds)
    child.kill()


def inside_a_save(events):
    """Points at which a checkpoint is half written."""
    return [index + 1 for index, name in enumerate(events) if name == "torch.save"]


def test_five_kills_one_inside_a_save(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(20)
    events = range(1, len(whole["events"]) + 1)
    kills = [
        draw.choice(events[:12]),  # before there is a checkpoint
        *draw.sample(events, 2),
        draw.choice(inside_a_save(whole["events"])),
        random.uniform(0.1, 0.8) * whole["seconds"],  # no hook in the process, and another moment every time
    ]
    for number, kill in enumerate(kills):
        config = kill_config(make_config, f"killed-{number}")
        assert killed_and_resumed(config, [kill], in_child) == whole["bytes"], kill


@pytest.mark.slow
def test_fifty_kills(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(50)
    saves, count = inside_a_save(whole["events"]), len(whole["events"])
    for number in range(50):
        kills = [draw.choice(saves) if number % 5 == 0 else draw.randint(1, count)]
        if number % 5 == 1:
            kills = [random.uniform(0.05, 0.95) * whole["seconds"]]
        elif number % 3 == 0 and kills[0] < count - 60:
            kills.append(draw.randrange(2, 30))  # a second time, soon after it was resumed
        config = kill_config(make_config, f"killed-{number}")
        assert killed_and_resumed(config, kills, in_child) == whole["bytes"], kills
