"""Runs cells one after another in this process, in parallel worker processes, or on Ray; the numbers are the same."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Literal

import torch

from braidlora.comparison._cells import NOTE, Cell
from braidlora.comparison._memory import MIB, PeakMemory, free_mib
from braidlora.comparison._progress import Progress, Works
from braidlora.config import RunConfig
from braidlora.errors import BraidloraError, ConfigError, DataWarning, Interrupted, TrainingError
from braidlora.evaluation.run import evaluate
from braidlora.models.location import local_folder
from braidlora.one_run import train
from braidlora.processes import Pool
from braidlora.runs import hold
from braidlora.training.stop import stop_requests
from braidlora.training.threads import cpu_threads

if TYPE_CHECKING:
    from braidlora.comparison._ray import RayCells

# What a worker needs besides the base model: Python, torch and transformers; and per byte of the base's weights their
# float32 copy, gradients and activations of a batch. Rough on purpose; --workers N overrides it.
_WORKER_MIB, _PER_BASE_BYTE = 700.0, 4.0
_SHARE_OF_FREE = 0.8


class CellRunner:
    """Runs cells, one after another or in worker processes.

    Args:
        recipe: of the comparison.
        workers: number of processes, or `auto`; with 1 the cells run in this process.
        progress: show on stderr how far the cells are, their losses and the time left.
        works: the work of a cell.
        overwrite: the runs were cleared first; the same command would clear them again.
        connect: to Ray, where cells then run instead; called when there is something to run.

    Attributes:
        failures: why a cell failed, by its name. A cell whose training fails does not stop the others.
    """

    def __init__(
        self,
        recipe: RunConfig,
        workers: int | Literal["auto"],
        progress: bool,
        works: Works,
        overwrite: bool = False,
        connect: Callable[[], RayCells] | None = None,
    ) -> None:
        if workers != "auto" and workers < 1:
            raise ConfigError(f"--workers: got {workers}; expected `auto` or an integer of at least 1.")
        self.recipe, self.workers, self.progress, self.works = recipe, workers, progress, works
        self.command = "the same command without --overwrite" if overwrite else "the same command"
        self.failures: dict[str, str] = {}
        self._connect = connect
        self._ray: RayCells | None = None

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells that are not done.

        Raises:
            Interrupted: by SIGTERM or Ctrl-C, once the current runs have saved.
            WorkerLost: a worker was killed.
            BraidloraError: what would fail other cells as well; it begins with the cell's name.
        """
        open_cells = [cell for cell in cells if not cell.is_done() and cell.name not in self.failures]
        if not open_cells:
            return
        if self._connect is not None:
            self._ray = self._ray or self._connect()
            workers, why = min(self._ray.at_once, len(open_cells)), "limited by Ray's resources"
        else:
            workers, why = _choose_workers(self.workers, self.recipe, len(open_cells))
        done = len(cells) - len(open_cells)
        works = [self.works(cell) for cell in cells]
        try:
            with (
                Progress(cells, works, workers, self.progress) as bar,
                closing(self._outcomes(open_cells, workers)) as outcomes,
            ):
                bar.say(f"{len(cells)} runs, {done} done; {workers} at a time ({why}); {bar.estimate()}")
                for cell, failure in outcomes:
                    done += 1
                    if failure is not None:
                        self.failures[cell.name] = failure
                    line = f"[{done}/{len(cells)}] {cell.name}{': ' + failure if failure else ''}"
                    bar.finished(cell.name, line)
        except Interrupted as stop:
            name = signal.Signals(stop.signal_number).name
            raise Interrupted(
                f"stopped by {name}; {done} of {len(cells)} runs are done; {self.command} resumes.",
                stop.signal_number,
            ) from None

    def _outcomes(
        self, cells: Sequence[Cell], workers: int
    ) -> Generator[tuple[Cell, str | None], None, None]:
        if self._ray is not None:
            yield from self._ray.as_completed(cells)
            return
        if workers == 1:
            yield from ((cell, run_cell(cell)) for cell in cells)
            return
        remedy = (
            "Finished runs are kept: start again with fewer than "
            f"{workers} workers (--workers {max(1, workers // 2)})."
        )
        with stop_requests(), Pool(workers, _no_state, saves=True, remedy=remedy) as pool:
            yield from pool.as_completed(_run_in_worker, cells)

    def close(self) -> None:
        """Leave Ray, if cells ran there."""
        if self._ray is not None:
            self._ray.close()


def _no_state() -> None:
    return None


def _run_in_worker(_: None, cell: Cell) -> str | None:
    return run_cell(cell)


def run_cell(cell: Cell) -> str | None:
    """Run a cell, or resume it.

    Returns:
        None, or why training failed: a loss that is not finite, memory or disk that ran out.

    Raises:
        BraidloraError: any other error, which would fail other cells as well; it begins with the cell's name.
    """
    with hold(cell.run.path):
        finished = cell.run.state() == "finished"  # killed before its note was written: the peak is lost
        gc.collect()
        memory = PeakMemory()
        try:
            if cell.kind == "base":
                with cpu_threads(cell.config.training.threads):
                    evaluate(cell.config.model.path, cell.config, directory=cell.run.path, progress=False)
            else:
                with warnings.catch_warnings():
                    # `compare` has given them, once for all cells.
                    warnings.simplefilter("ignore", DataWarning)
                    train(cell.config, resume="auto", evaluate=cell.evaluate, progress=False)
        except TrainingError as error:
            return str(error)
        except Interrupted:
            raise
        except BraidloraError as error:
            raise type(error)(f"{cell.name}: {error}") from error
        peak = memory.read()
        mib = None if finished else peak.mib
        # A tuning run that is now scored, or a run that was checked again.
        if (cell.run.path / NOTE).is_file():
            before = cell.note()["peak_memory_mib"]
            mib = max(mib or 0.0, before or 0.0) or None
        cell.write_note(mib, peak.what)
        return None


def _choose_workers(wanted: int | Literal["auto"], recipe: RunConfig, cells: int) -> tuple[int, str]:
    """How many processes, and why.

    `auto` takes as many as the cores allow (each cell has `training.threads` of them), as fit into memory, and as
    there are cells; on a GPU one.
    """
    if wanted != "auto":
        return min(wanted, cells), "as requested"
    if torch.cuda.is_available():
        return 1, "they would share the GPU; --workers N overrides that"
    base, free = local_folder(recipe.model), free_mib()
    if base is None or free is None:
        unknown = "the base's size" if base is None else "the free memory"
        return 1, f"{unknown} is not known; --workers N overrides that"
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) / MIB
    need = _WORKER_MIB + _PER_BASE_BYTE * weights
    threads = recipe.training.threads or 1
    room = int(_SHARE_OF_FREE * free / need)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cells, cores // threads, room)), (
        f"{cores} cores, {threads} {'thread' if threads == 1 else 'threads'} per run; {free / 1024:.1f} GiB free, "
        f"about {need / 1024:.1f} GiB per run"
    )
