"""Runs that are killed at chosen points and resumed, next to one that nothing interrupts."""

import json
import random
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Uninterrupted:
    """The result bytes of a run, the names of the events at which it can be killed, and its duration."""

    results: dict[str, bytes]
    events: list[str]
    seconds: float

    @classmethod
    def of(cls, config, in_child, results, events_file):
        start = time.monotonic()
        outcome = in_child(config, count_events=str(events_file))
        assert outcome.code == 0, outcome.output
        seconds = time.monotonic() - start
        return cls(results(config.output), json.loads(events_file.read_text()), seconds)

    def numbers(self, name):
        """The numbers of the events called `name`; the first event is number 1."""
        return [number for number, event in enumerate(self.events, 1) if event == name]


def kill_and_resume(config, kills, in_child):
    """Kill the run at each point of `kills` (an event's number, or a float: seconds), then let it finish."""
    for kill in kills:
        if isinstance(kill, float):
            outcome = in_child(config, resume="auto", while_running=_kill_after(kill))
            assert outcome.code in (-9, 0), outcome.output  # it may have been faster
        else:
            outcome = in_child(config, resume="auto", kill_at=kill)
            assert outcome.code == -9, outcome.output
    outcome = in_child(config, resume="auto")
    assert outcome.code == 0, outcome.output


def _kill_after(seconds):
    def kill(process):
        process.join(seconds)
        process.kill()

    return kill


def drawn_kills(number, draw, whole, *, often=(), ending=40):
    """Kill points for the `number`-th of many runs: an event or a moment, and for some runs a second event.

    Args:
        often: events of which every fifth run gets one.
        ending: runs killed in their last `ending` events are not killed again.
    """
    count = len(whole.events)
    if number % 5 == 1:
        return [random.uniform(0.05, 0.95) * whole.seconds]
    kills = [draw.choice(often) if often and number % 5 == 0 else draw.randint(1, count)]
    if number % 3 == 0 and kills[0] < count - ending:
        kills.append(draw.randrange(2, 30))  # again, soon after it was resumed
    return kills
