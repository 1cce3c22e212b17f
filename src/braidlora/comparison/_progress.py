"""How far a comparison is and how long it will take, measured on its own runs.

The runs write their logs as they go, in whatever process; this reads the last line of each. Seconds per training row
and per test row are averaged over what was measured so far, so the estimate follows the machine and not a table.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.comparison._cells import Cell
from braidlora.config import RunConfig
from braidlora.json_text import loads
from braidlora.runs import METRICS, PREDICTIONS
from braidlora.tasks import Task
from braidlora.terminal import printable, say

_EVERY = 1.0  # seconds between two looks
_LINE_EVERY = 60.0  # seconds between two lines where stderr is not a terminal
_WORTH_SAYING = 5.0  # seconds; a shorter estimate would be out of date when it is read
_TAIL = 1 << 16  # bytes at a log's end that hold its last line
_CLEAR = "\r\x1b[K"


@dataclass(frozen=True)
class Work:
    """What a run has to do: rows to train on, over all epochs, and rows to answer."""

    train: float
    test: int

    @classmethod
    def of(cls, cell: Cell, tasks: Sequence[Task]) -> Work:
        """The work of a cell; `tasks` are those of its recipe."""
        config: RunConfig = cell.config
        names = {task.name for task in config.tasks}
        own = [task for task in tasks if task.name in names]
        training = config.training
        rows = training.epochs * sum(len(task.train) for task in own)
        if training.max_steps is not None:
            rows = training.max_steps * training.batch_size * training.gradient_accumulation
        return cls(
            train=rows if cell.kind == "train" else 0.0,
            test=sum(len(task.test) for task in own) if cell.evaluate else 0,
        )


@dataclass(frozen=True)
class Measured:
    """How far a run is: rows trained on and answered, seconds for them, and the last loss."""

    train: float = 0.0
    test: float = 0.0
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    loss: float | None = None


def measure(cell: Cell, work: Work) -> Measured:
    """Read how far a run is from its files; nothing if there are none yet."""
    metrics = _json(cell.run.path / METRICS)
    timing = metrics.get("timing") or {}
    if timing:
        return Measured(
            work.train, work.test, timing.get("training_seconds", 0.0), timing.get("evaluation_seconds", 0.0)
        )
    line = _last_line(cell.run.log)
    if not line or not work.train:
        return Measured(test=_answered(cell))
    training = cell.config.training
    share = line["step"] / training.max_steps if training.max_steps else line["epoch"] / training.epochs
    share = min(1.0, share)
    answered = _answered(cell)
    if (cell.run.adapter).is_dir():
        share = 1.0
    return Measured(share * work.train, answered, line["timing"]["seconds"], 0.0, line.get("loss"))


def seconds_left(
    works: Sequence[Work], measured: Sequence[Measured], workers: int, done: Sequence[bool]
) -> tuple[float | None, bool]:
    """Seconds until all runs are done, and whether evaluation is part of it; None before anything was measured.

    Args:
        works, measured, done: by run.
        workers: runs at a time.
    """
    trained, train_seconds = sum(one.train for one in measured), sum(one.train_seconds for one in measured)
    scored = [one for one in measured if one.test_seconds]
    per_train = train_seconds / trained if trained and train_seconds else None
    tested = sum(one.test for one in scored)
    per_test = sum(one.test_seconds for one in scored) / tested if tested else None
    if per_train is None and per_test is None:
        return None, False
    left = longest = 0.0
    for work, one, finished in zip(works, measured, done, strict=True):
        if not finished:
            own = (per_train or 0.0) * (work.train - one.train) + (per_test or 0.0) * (work.test - one.test)
            left, longest = left + own, max(longest, own)
    return max(left / workers, longest), per_test is not None or not any(work.test for work in works)


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Shows on stderr how far the runs are: one line that is redrawn, or on a file a line a minute.

    Args:
        cells: all runs of this call.
        works: their work.
        workers: runs at a time.
        show: False shows nothing.
    """

    def __init__(self, cells: Sequence[Cell], works: Sequence[Work], workers: int, show: bool) -> None:
        self._cells, self._works, self._workers, self._show = cells, works, workers, show
        self._done = {cell.name for cell in cells if cell.is_done()}
        self._measured: dict[str, Measured] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._live = show and sys.stderr.isatty()
        self._said_estimate = False
        self._begun = self._last_line = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._look()
        if self._show:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._clear()

    def estimate(self) -> str:
        """How long all runs will take, in words, or that this will be measured."""
        left, with_tests = self._left()
        if left is None:
            return "the total time is estimated after the first steps"
        self._said_estimate = True
        more = "" if with_tests else " for training, plus evaluation"
        return f"about {in_words(left)}{more}, based on earlier runs"

    def finished(self, name: str, line: str) -> None:
        """A run is done, or has failed; `line` says so."""
        with self._lock:
            self._done.add(name)
        self._look()
        left, _ = self._left()
        open_runs = any(cell.name not in self._done for cell in self._cells)
        self.say(line + (f"; about {in_words(left)} left" if left is not None and open_runs else ""))

    def say(self, text: str) -> None:
        """A line above the status."""
        if self._show:
            with self._lock:
                self._clear()
                say(text, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._look()
            self._say_first_estimate()
            if self._live:
                with self._lock:
                    width = shutil.get_terminal_size().columns - 1
                    sys.stderr.write(_CLEAR + printable(self._status())[:width])
                    sys.stderr.flush()
            elif time.monotonic() - self._last_line >= _LINE_EVERY and (status := self._status()):
                self._last_line = time.monotonic()
                self.say(status)

    def _say_first_estimate(self) -> None:
        left, with_tests = self._left()
        if self._said_estimate or left is None:
            return
        self._said_estimate = True
        if left >= _WORTH_SAYING:
            more = "" if with_tests else ", plus evaluation, which was not measured yet"
            self.say(f"all runs will take about {in_words(left)}, estimated from the first steps{more}")

    def _look(self) -> None:
        found = {cell.name: measure(cell, work) for cell, work in zip(self._cells, self._works, strict=True)}
        with self._lock:
            self._measured = found

    def _left(self) -> tuple[float | None, bool]:
        measured = [self._measured[cell.name] for cell in self._cells]
        done = [cell.name in self._done for cell in self._cells]
        return seconds_left(self._works, measured, self._workers, done)

    def _status(self) -> str:
        parts = [f"[{len(self._done)}/{len(self._cells)}]"]
        for cell, work in zip(self._cells, self._works, strict=True):
            one = self._measured[cell.name]
            if cell.name in self._done or not (one.train or one.test):
                continue
            share = (one.train + one.test) / max(1.0, work.train + work.test)
            what = f" loss {one.loss:.3f}" if one.loss is not None else ""
            parts.append(f"{cell.name} {share:.0%}{what}")
        left, _ = self._left()
        if left is not None:
            parts.append(f"about {in_words(left)} left")
        return "  ".join(parts) if len(parts) > 1 else ""

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()


def _answered(cell: Cell) -> float:
    """Rows with an answer on disk."""
    folder: Path = cell.run.path / PREDICTIONS
    count = 0
    for path in folder.glob("*.jsonl") if folder.is_dir() else ():
        try:
            count += path.read_bytes().count(b"\n")
        except OSError:  # it is being replaced
            continue
    return float(count)


def _last_line(log: Path) -> dict[str, Any] | None:
    """The last training line of a log; None if there is none, or it is being written."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        if b'"loss"' in line and line.endswith(b"}"):
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return found
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found


Works = Callable[[Cell], Work]
