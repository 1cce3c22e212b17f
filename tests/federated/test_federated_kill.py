"""SIGKILL at any moment, also inside a commit: the resumed federation ends with the same bytes (faults.md 24)."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federation_child import result_bytes


@pytest.fixture(scope="module")
def uninterrupted():
    """Result bytes of a federation that nothing interrupts, how long it takes, and the events that a kill can hit."""
    return {}


def kill_config(make_config, output):
    """Rounds with sampled clients, kept optimizers and scores now and then: all that a resume has to take up."""
    return make_config(
        output, rule="fed-alora", rounds=3, sample={"number": 2}, optimizer_state="keep", evaluate_every=2,
        training__warmup_steps=1,
    )  # fmt: skip


def reference(uninterrupted, make_config, in_child, tmp_path):
    if not uninterrupted:
        events = tmp_path / "events.json"
        start = time.monotonic()
        outcome = in_child(kill_config(make_config, "whole"), count_events=str(events))
        assert outcome.code == 0, outcome.output
        uninterrupted["seconds"] = time.monotonic() - start
        uninterrupted["bytes"] = result_bytes(tmp_path / "whole")
        uninterrupted["events"] = json.loads(events.read_text())
    return uninterrupted


def killed_and_resumed(config, kills, in_child):
    """Kill the federation at each point of `kills`, an event by number or a moment in seconds, then let it end."""
    for kill in kills:
        if isinstance(kill, float):
            outcome = in_child(
                config,
                resume="auto",
                while_running=lambda child, after=kill: (child.join(after), child.kill()),
            )
            assert outcome.code in (-9, 0), outcome.output  # it may have been faster
        else:
            outcome = in_child(config, resume="auto", kill_at=kill)
            assert outcome.code == -9, outcome.output
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output
    return result_bytes(config.output)


def test_five_kills_one_inside_a_commit(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(24)
    events = whole["events"]
    jobs = [number for number, name in enumerate(events, 1) if name == "job"]
    numbers = range(1, len(events) + 1)
    kills = [
        draw.choice(numbers[: jobs[0]]),  # before the first round
        draw.choice([number for number in numbers if events[number - 1] == "step"]),
        draw.choice(
            [number for number in range(jobs[2], jobs[-3]) if events[number - 1] in ("fsync", "replace")]
        ),
        draw.choice(numbers[jobs[-3] :]),  # while adapters are written
        random.uniform(0.2, 0.9) * whole["seconds"],  # no hook in the process, and another moment every time
    ]
    for number, kill in enumerate(kills):
        config = kill_config(make_config, f"killed-{number}")
        assert killed_and_resumed(config, [kill], in_child) == whole["bytes"], (kill, number)


@pytest.mark.slow
def test_fifteen_kills(uninterrupted, make_config, in_child, tmp_path):
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    draw = random.Random(15)
    count = len(whole["events"])
    for number in range(15):
        kills = [draw.randint(1, count)]
        if number % 5 == 1:
            kills = [random.uniform(0.05, 0.95) * whole["seconds"]]
        elif number % 3 == 0 and kills[0] < count - 40:
            kills.append(draw.randrange(2, 30))  # a second time, soon after it was resumed
        config = kill_config(make_config, f"killed-{number}")
        assert killed_and_resumed(config, kills, in_child) == whole["bytes"], kills


@pytest.mark.parametrize(
    ("where", "number", "code"), [("step", 6, signal.SIGTERM), ("commit", 1, signal.SIGINT)]
)
def test_a_stopped_federation_leaves_with_the_signals_code_and_resumes(
    uninterrupted, make_config, in_child, tmp_path, where, number, code
):
    """In a training step the round is dropped; while a round is committed it is finished first."""
    whole = reference(uninterrupted, make_config, in_child, tmp_path)
    config = kill_config(make_config, "stopped")
    outcome = in_child(config, signal_at=(where, number, int(code)))
    assert outcome.code == 128 + code, outcome.output
    assert "--resume auto carries on" in outcome.output
    rounds = sorted(path.name for path in (tmp_path / "stopped" / "rounds").iterdir())
    assert not any(name.endswith(".partial") for name in rounds)
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output
    assert result_bytes(config.output) == whole["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fed_flan8", "fed_flan8_het"])
def test_flan8_killed_within_round_3_ends_with_the_same_bytes(recipe, tmp_path):
    """Through the command line, with three of the eight clients of the last round done."""
    if not Path("../shared").is_dir():
        pytest.skip("../shared is not here; this recipe reads its data and base from there")

    def command(output, *more):
        return [
            sys.executable, "-m", "braidlora", "federate", recipe, "--json", f"--output={output}",
            "--tasks.*.train.limit=48", "--tasks.*.test.limit=2", *more,
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL)
    try:
        while len(list(killed.glob("clients/*/state/pending-3"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert len((killed / "rounds.jsonl").read_text().splitlines()) == 2
    subprocess.run(command(killed, "--resume=auto"), check=True, stdout=subprocess.DEVNULL)
    assert result_bytes(killed) == result_bytes(whole)
