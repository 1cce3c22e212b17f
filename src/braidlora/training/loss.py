"""The loss per token and per task, summed on the device so that only logging waits for it.

Legend of shapes: B rows, L tokens, V vocabulary, C classes, T tasks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.tasks import IGNORED, LabelSpace


def token_losses(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy of every next token in float32, (B, L - 1); zero where the label is ignored."""
    logits = logits_BLV[:, :-1].float()
    targets = labels_BL[:, 1:]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape)


def class_losses(
    logits_BC: Tensor,
    labels_B: Tensor,
    task_id_B: Tensor,
    label_space: LabelSpace,
    weights_TC: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of every row, (B,), over the labels of its own task, times the weight of its label there."""
    losses = F.cross_entropy(label_space.masked(logits_BC.float(), task_id_B), labels_B, reduction="none")
    return losses if weights_TC is None else losses * weights_TC.to(losses.device)[task_id_B, labels_B]


def count_targets(labels: Tensor) -> Tensor:
    """How many targets have a loss: every class label, or every token that is not ignored but the first of a row."""
    return (labels if labels.dim() == 1 else labels[:, 1:]).ne(IGNORED).sum()


class Losses:
    """Losses of one batch, with the task and the number of targets of each.

    Attributes:
        values: per token (B, L - 1) or per row (B,); zero where ignored.
        counted: 1 where a target counts, 0 where not; same shape.
        tasks: the task id of each; same shape.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        task_id: Tensor,
        label_space: LabelSpace | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        if label_space is not None:
            self.values = class_losses(logits, labels, task_id, label_space, class_weights)
            self.counted = torch.ones_like(self.values)
            self.tasks = task_id
            return
        # Prompt-learning adapters prepend virtual tokens, whose logits have no target.
        self.values = token_losses(logits[:, -labels.shape[1] :], labels)
        self.counted = labels[:, 1:].ne(IGNORED).to(self.values.dtype)
        # Packed sequences hold several tasks: task_id then has one entry per token, -1 at padding.
        tasks = task_id[:, 1:].clamp(min=0) if task_id.dim() == 2 else task_id[:, None]
        self.tasks = tasks.expand_as(self.values)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Summed loss and number of targets of each row, both (B,)."""
        if self.values.dim() == 1:
            return self.values, self.counted
        return self.values.sum(dim=1), self.counted.sum(dim=1)


class TaskMeter:
    """Sums of loss and targets per task since the last `read`. Adding never waits for the device."""

    def __init__(self, num_tasks: int, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, num_tasks, device=device)

    def add(self, losses: Losses) -> None:
        tasks = losses.tasks.reshape(-1)
        self._sums[0].index_add_(0, tasks, losses.values.detach().reshape(-1))
        self._sums[1].index_add_(0, tasks, losses.counted.reshape(-1))

    def read(self, names: list[str], gather: Any = None) -> dict[str, float]:
        """Mean loss per target by task name, without tasks that have no targets; resets the sums.

        Args:
            names: task names by id.
            gather: sums a tensor over all processes; None for a single one.
        """
        sums = self._sums if gather is None else gather(self._sums)
        totals, counts = sums.tolist()
        self._sums.zero_()
        return {
            name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count
        }

    def state(self) -> list[list[float]]:
        """The sums, exact in JSON."""
        return self._sums.tolist()

    def restore(self, state: list[list[float]]) -> None:
        self._sums.copy_(torch.tensor(state))
