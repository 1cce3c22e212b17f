"""Run one cell: train and score it, or score the base model, and measure its peak memory."""

from __future__ import annotations

import gc

from braidlora.comparison._cells import NOTE, Cell
from braidlora.comparison._memory import PeakMemory
from braidlora.errors import BraidloraError, Interrupted, TrainingError
from braidlora.evaluation.run import evaluate
from braidlora.one_run import train
from braidlora.runs import hold
from braidlora.training.threads import cpu_threads


def run_cell(cell: Cell, progress: bool = False) -> str | None:
    """Run a cell, or resume it.

    Returns:
        None, or why training failed: a loss that is not finite, memory or disk that ran out.

    Raises:
        BraidloraError: any other error, which would fail other cells as well; it begins with the cell's name.
    """
    with hold(cell.run.path):
        return _run_cell(cell, progress)


def _run_cell(cell: Cell, progress: bool) -> str | None:
    finished = cell.run.state() == "finished"  # killed before its note was written: the peak is lost
    gc.collect()
    memory = PeakMemory()
    try:
        if cell.kind == "base":
            with cpu_threads(cell.config.training.threads):
                evaluate(cell.config.model.path, cell.config, directory=cell.run.path, progress=progress)
        else:
            train(cell.config, resume="auto", evaluate=cell.evaluate, progress=progress)
    except TrainingError as error:
        return str(error)
    except Interrupted:
        raise
    except BraidloraError as error:
        raise type(error)(f"{cell.name}: {error}") from error
    peak = memory.read()
    mib = None if finished else peak.mib
    if (cell.run.path / NOTE).is_file():  # a tuning run that is now scored, or a run that was checked again
        before = cell.note()["peak_memory_mib"]
        mib = max(mib or 0.0, before or 0.0) or None
    cell.write_note(mib, peak.what)
    return None
