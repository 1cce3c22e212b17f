"""A row at one point of the grid, and which point is chosen: on validation rows, never on test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from braidlora.comparison._cells import Cell
from braidlora.comparison.statistics import summary
from braidlora.config import RunConfig

RATE = "training.learning_rate"


def auto_grid(recipe: RunConfig) -> dict[str, list[float]]:
    """What `--tune auto` tries: the recipe's learning rate, a third of it and three times as much.

    The best rate of LoRA hardly depends on its rank (at a scaling of alpha / r), and differs between methods by less
    than this span as a rule; a best value at its edge is reported.
    """
    rate = recipe.training.learning_rate
    return {RATE: [float(f"{value:.3g}") for value in (rate / 3, rate, 3 * rate)]}


@dataclass(frozen=True)
class Trial:
    """The runs of a row with some values of the tuned keys, by seed; without tuning `values` is empty."""

    values: dict[str, Any]
    cells: dict[int, Cell]

    def finished(self) -> dict[int, Cell]:
        """Its finished runs, by seed."""
        return {seed: cell for seed, cell in self.cells.items() if cell.is_done()}

    def loss(self, failures: Mapping[str, str]) -> dict[str, Any]:
        """`{"values", "validation_loss", "reason"}`: a summary over seeds, or None and why a seed has no loss."""
        entry: dict[str, Any] = {"values": self.values, "validation_loss": None, "reason": None}
        failed = [
            f"{cell.name}: {failures[cell.name]}" for cell in self.cells.values() if cell.name in failures
        ]
        if failed:
            return {**entry, "reason": failed[0]}
        losses = [cell.note()["validation_loss"] for cell in self.cells.values()]
        return {**entry, "validation_loss": summary(losses)}


def choose(trials: Sequence[Trial], failures: Mapping[str, str]) -> tuple[Trial, list[dict[str, Any]]]:
    """The trial with the lowest validation loss (mean over seeds; ties go to the first), and the losses of all.

    A trial with a failed run is chosen only if every trial has one. A single trial needs no choice and has no losses.
    """
    if len(trials) == 1:
        return trials[0], []
    losses = [trial.loss(failures) for trial in trials]
    known = [number for number, loss in enumerate(losses) if loss["validation_loss"] is not None]
    best = min(known, key=lambda number: losses[number]["validation_loss"]["mean"], default=0)
    return trials[best], losses
