"""Task-aware mixing: the order of the rows as a pure function of seed and epoch.

An epoch has as many draws as there are training rows. Task t gets a fixed share of them:

| `strategy` | share of task t |
|---|---|
| `proportional` | rows_t: every row once per epoch |
| `uniform` | the same for all tasks |
| `temperature` | rows_t^(1/T): T = 1 is proportional, a large T uniform |
| `weights` | the recipe's weight |

Shares are allocated exactly (largest remainder), not at random, and the draws are shuffled. Within a task, rows are
drawn without replacement: a new shuffled pass starts only when the previous one is finished, also across epochs, so
that the numbers of visits of any two rows of a task never differ by more than one.

Draws have no state: the k-th row of an epoch depends only on seed, epoch and k, so a run resumes in the middle of an
epoch by skipping rows.

The rows of one optimizer step are sorted by length. Batches are padded to their longest row, so if a step has several
batches (gradient accumulation, several processes), rows of similar length share a batch and waste little. The sum over
the step is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from braidlora.config import MixingSection
from braidlora.errors import ConfigError
from braidlora.tasks.dataset import MultiTaskDataset

_ORDER, _ROWS = 0, 1  # one stream of random numbers for each purpose


def mixing_probabilities(mixing: MixingSection, rows: dict[str, int]) -> dict[str, float]:
    """The probability that a draw is from each task, given the tasks' numbers of training rows.

    Raises:
        ConfigError: every task with rows has weight 0.
    """
    if mixing.strategy == "uniform":
        shares = {name: float(count > 0) for name, count in rows.items()}
    elif mixing.strategy == "temperature":
        shares = {name: count ** (1.0 / mixing.temperature) if count else 0.0 for name, count in rows.items()}
    elif mixing.strategy == "weights":
        shares = {name: mixing.weights[name] if count else 0.0 for name, count in rows.items()}
    else:
        shares = {name: float(count) for name, count in rows.items()}
    total = sum(shares.values())
    if total <= 0.0:
        raise ConfigError(
            "mixing.weights: all tasks with rows have weight 0; give at least one a weight above 0."
        )
    return {name: share / total for name, share in shares.items()}


def draws_per_epoch(probabilities: Sequence[float], total: int) -> list[int]:
    """Allocate `total` draws by `probabilities` with the largest-remainder method.

    A task with a positive probability gets at least one draw (taken from the task with the most), so that no task
    is silently excluded.
    """
    exact = [probability * total for probability in probabilities]
    draws = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda task: (draws[task] - exact[task], task))
    for task in by_remainder[: total - sum(draws)]:
        draws[task] += 1
    for task, probability in enumerate(probabilities):
        largest = max(range(len(draws)), key=lambda other: draws[other])
        if probability > 0.0 and draws[task] == 0 and draws[largest] > 1:
            draws[task], draws[largest] = 1, draws[largest] - 1
    return draws


class MixingSampler(Sampler[int]):
    """The row indices of one epoch in mixed order; see the docstring of this module.

    Args:
        dataset: the training rows of all tasks.
        mixing: the recipe's `mixing` section.
        seed: the recipe's seed.
        rows_per_step: rows of one optimizer step, over all batches and processes.
    """

    def __init__(
        self, dataset: MultiTaskDataset, mixing: MixingSection, seed: int, rows_per_step: int = 1
    ) -> None:
        self.seed = seed
        self.epoch = 0
        self.rows_per_step = rows_per_step
        self._lengths = dataset.lengths()
        task_ids = np.asarray(dataset.task_ids, dtype=np.int64)
        self._rows = [np.flatnonzero(task_ids == task) for task in range(len(dataset.task_names))]
        counts = {name: len(rows) for name, rows in zip(dataset.task_names, self._rows, strict=True)}
        self.probabilities = mixing_probabilities(mixing, counts)
        self.draws = draws_per_epoch(list(self.probabilities.values()), len(dataset))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices(self.epoch))

    def indices(self, epoch: int) -> list[int]:
        """All rows of `epoch` in training order."""
        drawn = self.drawn(epoch)
        steps = (drawn[at : at + self.rows_per_step] for at in range(0, len(drawn), self.rows_per_step))
        return [row for step in steps for row in sorted(step, key=self._lengths.__getitem__)]

    def drawn(self, epoch: int) -> list[int]:
        """All draws of `epoch` in order, before the rows of each step are sorted by length."""
        drawn = np.concatenate([self._task_draws(task, epoch) for task in range(len(self._rows))])
        order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(drawn))
        return drawn[order].tolist()

    def drawn_until(self, step: int) -> set[int]:
        """The rows that the first `step` optimizer steps use, over all epochs."""
        steps = -(-len(self) // self.rows_per_step)
        epochs, rest = divmod(step, steps)
        whole = {row for epoch in range(epochs) for row in self.drawn(epoch)}
        return whole | set(self.drawn(epochs)[: rest * self.rows_per_step])

    def _task_draws(self, task: int, epoch: int) -> np.ndarray:
        """Draws epoch·n … (epoch + 1)·n - 1 of the task's endless sequence of shuffled passes."""
        rows, count = self._rows[task], self.draws[task]
        if count == 0:
            return rows[:0]
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(rows), (last - 1) // len(rows) + 1)
        stream = np.concatenate(
            [
                rows[np.random.default_rng([self.seed, _ROWS, task, one]).permutation(len(rows))]
                for one in passes
            ]
        )
        skipped = first - passes.start * len(rows)
        return stream[skipped : skipped + count]
