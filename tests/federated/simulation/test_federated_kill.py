"""SIGKILL at any moment, also during a commit: the resumed federation ends with the same bytes (faults.md 24)."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from braidlora.config import FederatedConfig, load_config
from helpers.data import require_sources
from helpers.kills import Uninterrupted, drawn_kills, kill_and_resume
from helpers.results import federation_bytes


def kill_config(make_config, output):
    """Rounds with sampled clients, kept optimizers and occasional scores: everything that a resume has to restore."""
    return make_config(
        output, rule="fed-alora", rounds=3, sample={"number": 2}, optimizer_state="keep", evaluate_every=2,
        training__warmup_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def whole(known, make_config, in_child, tmp_path):
    """The federation that nothing interrupts."""
    if not known:
        config = kill_config(make_config, "whole")
        known["run"] = Uninterrupted.of(config, in_child, federation_bytes, tmp_path / "events.json")
    return known["run"]


def test_five_kills_one_during_a_commit(whole, make_config, in_child):
    draw = random.Random(24)
    jobs = whole.numbers("job")
    writes = {*whole.numbers("fsync"), *whole.numbers("replace")}
    numbers = range(1, len(whole.events) + 1)
    kills = [
        draw.choice(numbers[: jobs[0]]),  # before the first round
        draw.choice(whole.numbers("step")),
        draw.choice([number for number in range(jobs[2], jobs[-3]) if number in writes]),
        draw.choice(numbers[jobs[-3] :]),  # while adapters are written
        random.uniform(0.2, 0.9)
        * whole.seconds,  # without a hook in the process, at another moment every time
    ]
    for number, kill in enumerate(kills):
        config = kill_config(make_config, f"killed-{number}")
        kill_and_resume(config, [kill], in_child)
        assert federation_bytes(config.output) == whole.results, (kill, number)


@pytest.mark.slow
def test_fifteen_kills(whole, make_config, in_child):
    draw = random.Random(15)
    for number in range(15):
        kills = drawn_kills(number, draw, whole)
        config = kill_config(make_config, f"killed-{number}")
        kill_and_resume(config, kills, in_child)
        assert federation_bytes(config.output) == whole.results, kills


@pytest.mark.parametrize(
    ("where", "number", "code"), [("step", 6, signal.SIGTERM), ("commit", 1, signal.SIGINT)]
)
def test_a_stopped_federation_leaves_with_the_signals_code_and_resumes(
    whole, make_config, in_child, tmp_path, where, number, code
):
    """In a training step the round is dropped; while a round is committed it is finished first."""
    config = kill_config(make_config, "stopped")
    outcome = in_child(config, signal_at=(where, number, int(code)))
    assert outcome.code == 128 + code, outcome.output
    assert "--resume auto continues" in outcome.output
    rounds = sorted(path.name for path in (tmp_path / "stopped" / "rounds").iterdir())
    assert not any(name.endswith(".partial") for name in rounds)
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output
    assert federation_bytes(config.output) == whole.results


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fed_flan8_small", "fed_flan8_het_small"])
def test_flan8_killed_within_round_3_ends_with_the_same_bytes(recipe, tmp_path):
    """Through the command line, with three of the eight clients of the last round done."""
    recipe = str(Path(__file__).parents[3] / "benchmarks" / f"{recipe}.yaml")
    require_sources(load_config(recipe, [], FederatedConfig))

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
    assert federation_bytes(killed) == federation_bytes(whole)
