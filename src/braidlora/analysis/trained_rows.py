"""The training rows that a model was really trained on: those that the sampler had drawn by its step.

`training.max_steps` may end a run before the first epoch does, and a task may have no share in the mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from braidlora.analysis.steps import steps_of
from braidlora.errors import DataError
from braidlora.models.origin import recipe_of
from braidlora.runs import IDENTITY, Committed, RunDirectory, quoted
from braidlora.tasks import MixingSampler, MultiTaskDataset, encode_tasks, fingerprints

if TYPE_CHECKING:
    from pathlib import Path

    from braidlora.models.loading import Loaded


@dataclass(frozen=True)
class TrainedRows:
    """Which encoded training rows of all tasks a model was trained on.

    Attributes:
        rows: all of them.
        seen: the indices of those that it was trained on.
        when: how long it was trained, for messages.
        whose: the client that the rows are of, for messages; empty for a run.
    """

    rows: MultiTaskDataset
    seen: set[int]
    when: str
    whose: str = ""

    def of(self, task: str) -> list[int]:
        """The indices of a task's rows among those seen, in order."""
        number = self.rows.task_names.index(task)
        of_task = np.flatnonzero(np.asarray(self.rows.task_ids) == number).tolist()
        return [index for index in of_task if index in self.seen]

    def too_few(self, wanted: int) -> list[str]:
        """A sentence for every task of whose rows fewer were seen than are wanted and there are."""
        found = []
        for task, counts in self.rows.counts.items():
            seen = len(self.of(task))
            if seen < min(wanted, counts.rows):
                then = "only these are held in" if seen else "so it is left out"
                of_all = f"{seen} of its {counts.rows} training rows were trained on {self.when}"
                found.append(f"{self.whose}task {task}: {of_all}; {then}")
        return found


def of_run(run: RunDirectory, folder: Path, loaded: Loaded) -> TrainedRows:
    """The rows that the adapter in `folder`, one of the run's, was trained on.

    For `adapter_init`, which is from before the first step, they are those of the run's result: a control.

    Raises:
        CheckpointError: the run's log is missing or damaged.
        DataError: the training rows are not those of the run.
    """
    config = recipe_of(run)  # its own: overrides change neither the order nor the length of what is over
    rows = encode_tasks(loaded.tasks, loaded.tokenizer, loaded.config.prompt, "train", loaded.label_space)
    _check_rows(run, loaded, rows)
    kept = {run.checkpoint(step).resolve(): step for step in run.checkpoint_steps()}
    step = kept.get(folder.resolve())
    if step is None:
        step = steps_of(run, config).adapter
    # Without a checkpoint one process is assumed, which counts too few of the rows of several, but no others.
    processes = Committed(max(kept, key=kept.__getitem__)).read_json(IDENTITY)["world_size"] if kept else 1
    training = config.training
    rows_per_step = training.batch_size * training.gradient_accumulation * processes
    sampler = MixingSampler(rows, config.mixing, config.seed, rows_per_step)
    return TrainedRows(rows, sampler.drawn_until(step), f"by step {step}")


def _check_rows(run: RunDirectory, loaded: Loaded, rows: MultiTaskDataset) -> None:
    """Raise DataError where the training rows are not those in the run's record: it is unknown which were drawn."""
    recorded, now = run.read_json(run.data.name)["tasks"], fingerprints(loaded.tasks)
    changed = []
    for task in loaded.tasks:
        part = recorded.get(task.name, {}).get("train")
        before = (part["sha256"], part["encoded"]["rows"]) if part else None
        if before != ((now[task.name]["train"], rows.counts[task.name].rows) if task.train else None):
            changed.append(task.name)
    if changed or len(recorded) != len(loaded.tasks):
        raise DataError(
            f"{run.path}: the training rows of {quoted(changed or sorted(recorded))} are not those in {run.data.name}, "
            "so it is unknown which of them the run has drawn. Leave out overrides that change them, give the data it "
            "was trained on, or name a recipe's rows for a copy of the adapter folder (--recipe)."
        )
