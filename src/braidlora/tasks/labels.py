"""The label space of `classify` tasks: one head over the union of all tasks' labels, masked per task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.json_text import loads
from braidlora.runs import AdapterCard, TaskCard, quoted
from braidlora.tasks._task import Task


class LabelSpace:
    """All labels of a model, and which of them belong to each task.

    A label that several tasks have in common (`negative` in two sentiment tasks) is one class of the head.

    Attributes:
        task_labels: the labels of each task, by task name, in the order of the tasks.
        names: the union, in order of first appearance unless given; class i of the head is `names[i]`.
        mask: (tasks, labels) bool, true where a label belongs to a task.
    """

    def __init__(self, task_labels: dict[str, list[str]], names: Sequence[str] | None = None) -> None:
        self.task_labels = task_labels
        self.names = list(
            names or dict.fromkeys(label for labels in task_labels.values() for label in labels)
        )
        self._index = {label: index for index, label in enumerate(self.names)}
        self.mask: Tensor = torch.zeros(len(task_labels), len(self.names), dtype=torch.bool)
        for row, labels in enumerate(task_labels.values()):
            self.mask[row, [self._index[label] for label in labels]] = True

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> LabelSpace:
        """The label space of `tasks`.

        Raises:
            DataError: a task has fewer than two labels.
        """
        for task in tasks:
            if len(task.labels or []) < 2:
                raise DataError(
                    f"task {task.name}: a `classify` task needs at least two labels, got {task.labels or 'none'}."
                )
        return cls({task.name: list(task.labels or []) for task in tasks})

    @classmethod
    def from_card(cls, card: AdapterCard) -> LabelSpace | None:
        """The label space that an adapter was trained with, or None if its card has no labels."""
        return cls(card.task_labels, card.labels) if card.labels and card.task_labels else None

    def cards(self) -> list[TaskCard]:
        """Every task with its labels and the indices of their logits."""
        return [
            TaskCard(name=name, kind="classify", labels=labels, indices=[self.index(one) for one in labels])
            for name, labels in self.task_labels.items()
        ]

    def check(self, tasks: Sequence[Task], trained: str) -> None:
        """Reject tasks whose labels differ from these. Order does not matter, because labels are matched by name.

        Args:
            tasks: the tasks of a recipe. A task that lists its labels (`options`) must have the same ones; a task
                whose labels were found in its rows may have fewer. Tasks unknown to this label space are ignored.
            trained: what these labels belong to, for the message.

        Raises:
            ConfigError: a task lists different labels; the message has both lists.
            DataError: a task's rows have a label that is unknown here.
        """
        for task in tasks:
            known, given = self.task_labels.get(task.name), task.labels or []
            if known is None or set(given) == set(known):
                continue
            sides = (
                f"task {task.name}: {trained} has the labels {quoted(known)}; the recipe has {quoted(given)}."
            )
            if task.options is not None:
                raise ConfigError(
                    f"{sides} List the labels of the training (in any order), or train with yours."
                )
            if unknown := [label for label in given if label not in known]:
                raise DataError(
                    f"{sides} Rows labeled {quoted(unknown)} cannot be predicted; exclude them with `where`."
                )

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        return dict(self._index)

    def index(self, label: str) -> int:
        """The class of `label`.

        Raises:
            DataError: no task has such a label.
        """
        if label not in self._index:
            raise DataError(f"unknown label {label!r}; known are {', '.join(self.names)}.")
        return self._index[label]

    def masked(self, logits: Tensor, task_id: Tensor) -> Tensor:
        """`logits` (B, labels) with -inf at labels of other tasks; `task_id` (B,) is the task of each row."""
        allowed = self.mask.to(logits.device)[task_id]
        return logits.masked_fill(~allowed, float("-inf"))

    def to_json(self) -> str:
        return json.dumps({"tasks": self.task_labels}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, path: str | Path, data: bytes) -> LabelSpace:
        """Parse `data`, which was read from `path`.

        Raises:
            CheckpointError: it is not a label space.
        """
        try:
            tasks = loads(data.decode("utf-8"))["tasks"]
            well_formed = all(isinstance(labels, list) for labels in tasks.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            well_formed = False
        if not well_formed:
            raise CheckpointError(f"{path}: not a label space; expected {{'tasks': {{name: [labels]}}}}.")
        return cls(tasks)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LabelSpace)
            and self.names == other.names
            and list(self.task_labels.items()) == list(other.task_labels.items())
        )

    __hash__ = None  # type: ignore[assignment]
