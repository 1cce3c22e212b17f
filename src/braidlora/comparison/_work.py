"""What a worker process does: one cell after another, with the memory of each measured."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from braidlora.comparison._cells import NOTE, Cell
from braidlora.comparison._memory import PeakMemory
from braidlora.errors import BraidloraError, Interrupted, TrainingError
from braidlora.runs import hold


def start_worker() -> None:
    """Set up a worker: Ctrl-C is the main process's business, and where that one ends, so does this."""
    if os.name != "nt":
        os.setpgrp()  # a terminal sends Ctrl-C to the whole group, and a second signal would cut the save short
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # an orphan would go on writing into a run that a new comparison resumes


def run_cell_in_worker(cell: Cell) -> str | None:
    """`run_cell`; a worker that was told to stop ends, for the pool has the next cell in hand already."""
    try:
        return run_cell(cell)
    except Interrupted as stop:
        os._exit(stop.exit_code)


def run_cell(cell: Cell, progress: bool = False) -> str | None:
    """Bring one cell to its end, from wherever it stands.

    Returns:
        None, or why training could not be done: a loss that is not finite, memory or disk that ran out.

    Raises:
        BraidloraError: anything else, which would fail other cells as well; it begins with the cell's name.
    """
    with hold(cell.run.path):
        return _run_cell(cell, progress)


def _run_cell(cell: Cell, progress: bool) -> str | None:
    ended = cell.run.state() == "finished"  # killed before its note was written: the peak is gone
    gc.collect()
    memory = PeakMemory()
    try:
        if cell.kind == "base":
            _score_base(cell, progress)
        else:
            from braidlora.train import train

            train(cell.config, resume="auto", evaluate=cell.evaluate, progress=progress)
    except TrainingError as error:
        return str(error)
    except Interrupted:
        raise
    except BraidloraError as error:
        raise type(error)(f"{cell.name}: {error}") from error
    peak = memory.read()
    mib = None if ended else peak.mib
    if (cell.run.path / NOTE).is_file():  # a tuning run that is now scored, or one that was looked at again
        before = cell.note()["peak_memory_mib"]
        mib = max(mib or 0.0, before or 0.0) or None
    cell.write_note(mib, peak.what)
    return None


def _score_base(cell: Cell, progress: bool) -> None:
    from braidlora.evaluation.run import evaluate
    from braidlora.training.threads import cpu_threads

    with cpu_threads(cell.config.training.threads):
        evaluate(cell.config.model.path, cell.config, directory=cell.run.path, progress=progress)
