"""Weights of labels in the loss of `classify` tasks, for labels with few training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from braidlora.config import RunConfig
from braidlora.errors import ConfigError
from braidlora.tasks._task import Task
from braidlora.tasks.labels import LabelSpace


def class_weights(config: RunConfig, tasks: Sequence[Task], label_space: LabelSpace | None) -> Tensor | None:
    """The weight of every label in every task's loss, (tasks, labels) float32; None if no task has weights.

    `balanced` gives label c of a task with n training rows and k labels in them n / (k n_c), where n_c of the rows have
    it. The weights of a task's rows then have mean 1, so tasks weigh as much as without, and so does the learning rate.

    Args:
        config: the recipe.
        tasks: in the order of their ids.
        label_space: of `classify` tasks.

    Raises:
        ConfigError: a weight is for a label that its task does not have.
    """
    sections = {one.name: one.class_weights for one in config.tasks}
    if label_space is None or not any(sections.get(task.name) for task in tasks):
        return None
    weights = torch.ones(len(tasks), len(label_space.names))
    for row, task in enumerate(tasks):
        given = sections.get(task.name)
        if given == "balanced":
            counts = Counter(one["label"] for one in task.train)
            given = {label: len(task.train) / (len(counts) * count) for label, count in counts.items()}
        for label, weight in (given or {}).items():
            if label not in label_space.task_labels[task.name]:
                known = ", ".join(map(repr, label_space.task_labels[task.name]))
                raise ConfigError(
                    f"tasks.{task.name}.class_weights: no label {label!r}; the labels are {known}."
                )
            weights[row, label_space.index(label)] = weight
    return weights
