"""A few rows of every task as batches, for the analyses that need the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from braidlora.errors import DataError
from braidlora.tasks import Collator, Part, Row, Task, encode_tasks

if TYPE_CHECKING:
    from braidlora.models.loading import Loaded

ROWS = 64  # of a task, by default
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TaskBatches:
    """Rows of one task, encoded and padded as in training, on the model's device.

    Attributes:
        task: its name.
        part: of the task's rows.
        rows: their number.
        halves: the batches of the first and of the second half of the rows; with one row the second is empty.
    """

    task: str
    part: Part
    rows: int
    halves: tuple[list[Batch], list[Batch]]

    @property
    def batches(self) -> list[Batch]:
        return self.halves[0] + self.halves[1]


def drawn_rows(task: Task, part: Part, rows: int, seed: int) -> list[Row]:
    """Up to `rows` rows of a part of a task, drawn with the recipe's seed."""
    given = task.rows(part)
    return random.Random(f"{seed}/{task.name}/analyze").sample(given, min(rows, len(given)))


def task_batches(loaded: Loaded, rows: int, parts: Sequence[Part]) -> list[TaskBatches]:
    """Up to `rows` rows of every task, drawn with the recipe's seed.

    Args:
        loaded: model, tokenizer and tasks.
        rows: at most this many of each task.
        parts: the rows are from the first of these that a task has; a task with none is left out.

    Raises:
        DataError: no task has such rows.
    """
    config, device = loaded.config, loaded.model.device
    collate, size = Collator(loaded.tokenizer.pad_token_id, config.kind), config.training.batch_size
    found = []
    for task in loaded.tasks:
        part = next((part for part in parts if task.rows(part)), None)
        if part is None:
            continue
        sample = drawn_rows(task, part, rows, config.seed)
        # The other tasks stay, without rows, so that task ids, labels and masks are the same as in training.
        alone = [replace(other, train=sample if other is task else []) for other in loaded.tasks]
        data = encode_tasks(alone, loaded.tokenizer, config.prompt, "train", loaded.label_space)
        encoded = [data[index] for index in range(len(data))]
        middle = -(-len(encoded) // 2)
        first, second = (
            [
                {key: value.to(device) for key, value in collate(half[start : start + size]).items()}
                for start in range(0, len(half), size)
            ]
            for half in (encoded[:middle], encoded[middle:])
        )
        found.append(TaskBatches(task.name, part, len(encoded), (first, second)))
    if not found:
        raise DataError(f"no task has {' or '.join(parts)} rows to analyze.")
    return found
