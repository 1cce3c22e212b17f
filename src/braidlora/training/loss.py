"""The loss per token and per task, summed on the device so that only logging waits for it.

Legend of shapes: B rows, L tokens, K positions with logits, V vocabulary, C classes, T tasks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.tasks import IGNORED, LabelSpace


def token_losses(logits_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    """Cross-entropy of every target in float32, (B, K); zero where it is ignored."""
    logits = logits_BKV.float()
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets_BK.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets_BK.shape)


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

    Args:
        logits: (B, L, V) or, with `positions`, (B, K, V); of a classifier (B, C).
        labels: (B, L), or (B,) of a classifier.
        task_id: (B,), or (B, L) of packed rows.
        label_space, class_weights: of a classifier.
        positions: (B, K), those that the logits are of; None for all.

    Attributes:
        values: per target (B, K), where K is L - 1 without `positions`, or per row (B,); zero where ignored.
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
        positions: Tensor | None = None,
    ) -> None:
        if label_space is not None:
            self.values = class_losses(logits, labels, task_id, label_space, class_weights)
            self.counted = torch.ones_like(self.values)
            self.tasks = task_id
            return
        if positions is None:
            # Prompt-learning adapters prepend virtual tokens, whose logits have no target.
            logits = logits[:, -labels.shape[1] : -1]
        targets = _next(labels, positions, IGNORED)
        self.values = token_losses(logits, targets)
        self.counted = targets.ne(IGNORED).to(self.values.dtype)
        # Packed sequences hold several tasks: task_id then has one entry per token, -1 at padding.
        tasks = _next(task_id, positions, -1).clamp(min=0) if task_id.dim() == 2 else task_id[:, None]
        self.tasks = tasks.expand_as(self.values)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Summed loss and number of targets of each row, both (B,)."""
        if self.values.dim() == 1:
            return self.values, self.counted
        return self.values.sum(dim=1), self.counted.sum(dim=1)


def _next(values_BL: Tensor, positions_BK: Tensor | None, after: int) -> Tensor:
    """The values one token after each position, or after all but the last; `after` follows the last token."""
    if positions_BK is None:
        return values_BL[:, 1:]
    return F.pad(values_BL, (0, 1), value=after).gather(1, positions_BK + 1)


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
