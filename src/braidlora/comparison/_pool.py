"""Cells one after another in this process, or side by side in worker processes; the numbers are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Literal

from braidlora.comparison._cells import Cell
from braidlora.comparison._memory import MIB, free_mib
from braidlora.comparison._work import run_cell, run_cell_in_worker, start_worker
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, Interrupted, TrainingError
from braidlora.models.base import local_folder
from braidlora.terminal import say
from braidlora.training.stop import stop_requests

# What a worker needs beside the base: Python, torch and transformers, and per byte of the base's weights their float32
# copy, gradients and activations of a batch. Rough on purpose; --workers N overrules it.
_WORKER_MIB, _PER_BASE_BYTE = 700.0, 4.0
_SHARE_OF_FREE = 0.8


class Crew:
    """Brings cells to their end, one after another or in worker processes.

    Args:
        recipe: of the comparison.
        workers: processes, or `auto`; with 1 the cells run in this process.
        progress: one line per cell on stderr, and with one worker the bars of each run.
        overwrite: the runs were cleared before, as the same command would do again.

    Attributes:
        failures: why a cell failed, by its name. A cell whose training fails does not keep others from theirs.
    """

    def __init__(
        self, recipe: RunConfig, workers: int | Literal["auto"], progress: bool, overwrite: bool = False
    ) -> None:
        if workers != "auto" and workers < 1:
            raise ConfigError(f"--workers: got {workers}; expected `auto`, or a whole number of at least 1.")
        self.recipe, self.wanted, self.progress = recipe, workers, progress
        self.again = "the same command without --overwrite" if overwrite else "the same command"
        self.failures: dict[str, str] = {}

    def work(self, cells: Sequence[Cell]) -> None:
        """Bring all cells to their end; those that are done already are left alone.

        Raises:
            Interrupted: by SIGTERM or Ctrl-C, once the runs in hand have saved.
            TrainingError: a worker was killed.
            BraidloraError: what would fail other cells as well; it begins with the cell's name.
        """
        open_cells = [cell for cell in cells if not cell.is_done() and cell.name not in self.failures]
        if not open_cells:
            return
        workers, why = _choose_workers(self.wanted, self.recipe, len(open_cells))
        ended = len(cells) - len(open_cells)
        self._say(f"{len(cells)} runs, {ended} of them done; {workers} at a time ({why})")
        try:
            for cell, failure in self._outcomes(open_cells, workers):
                ended += 1
                if failure is not None:
                    self.failures[cell.name] = failure
                self._say(f"[{ended}/{len(cells)}] {cell.name}{': ' + failure if failure else ''}")
        except Interrupted as stop:
            name = signal.Signals(stop.signal_number).name
            raise Interrupted(
                f"stopped by {name}; {ended} of {len(cells)} runs are done, and {self.again} carries on.",
                stop.signal_number,
            ) from None

    def _outcomes(self, cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, str | None]]:
        if workers == 1:
            return ((cell, run_cell(cell, self.progress)) for cell in cells)
        return _in_processes(cells, workers)

    def _say(self, text: str) -> None:
        if self.progress:
            say(text, file=sys.stderr, flush=True)


def _in_processes(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, str | None]]:
    # A fresh interpreter each: a fork would inherit torch's threads, and cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with stop_requests(), ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        futures: dict[Future[str | None], Cell] = {}
        try:
            for cell in cells:  # starts the workers, so a signal may come as early as here
                futures[pool.submit(run_cell_in_worker, cell)] = cell
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise TrainingError(
                "a worker process was killed; most often memory ran out. The runs that are done are kept: start again "
                f"with fewer than {workers} workers (--workers {max(1, workers // 2)})."
            ) from None
        except BaseException:
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.terminate()  # a run in hand finishes its step and saves
            raise


def _choose_workers(wanted: int | Literal["auto"], recipe: RunConfig, cells: int) -> tuple[int, str]:
    """How many processes, and why.

    `auto` takes as many as there are cores for (each cell has `training.threads` of them), as memory has room for,
    and as there are cells; on a GPU one.
    """
    import torch

    if wanted != "auto":
        return min(wanted, cells), "as asked for"
    if torch.cuda.is_available():
        return 1, "they would share the GPU; --workers N overrules that"
    base, free = local_folder(recipe.model), free_mib()
    if base is None or free is None:
        unknown = "the base's size" if base is None else "the free memory"
        return 1, f"{unknown} is not known; --workers N overrules that"
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) / MIB
    need = _WORKER_MIB + _PER_BASE_BYTE * weights
    threads = recipe.training.threads or 1
    room = int(_SHARE_OF_FREE * free / need)
    cores = _cores()
    return max(1, min(cells, cores // threads, room)), (
        f"{cores} cores, {threads} {'thread' if threads == 1 else 'threads'} a run; {free / 1024:.1f} GiB free, about "
        f"{need / 1024:.1f} GiB a run"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
