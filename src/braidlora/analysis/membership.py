"""Does a model tell its training rows from others? The attack by a loss threshold, and how well it does.

Whoever has a model and a row can compute the row's loss, and guess that a row of small loss was trained on (Yeom et
al., arXiv 1709.01604). The AUC is the probability that of one held-in and one held-out row, the held-in one has the
smaller loss: 0.5 is chance, 1 is certainty. Rows of one task, and of one client, are compared only with each other.

Held in are only rows that the training drew until the model's step, see `trained_rows`.

The base model, without the adapter, has seen neither: if it tells them apart as well, they differ in themselves. The
`calibrated` attack therefore subtracts its loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from braidlora.adapters import for_tasks
from braidlora.analysis.trained_rows import TrainedRows, of_run
from braidlora.config import load_config, schema_of
from braidlora.errors import ConfigError, DataError
from braidlora.federated.simulation.final import final_models, last_round, trained_rows
from braidlora.models.loading import Loaded, load_for_evaluation
from braidlora.runs import FederatedDirectory, run_around
from braidlora.tasks import Collator, Row, Task, encode_tasks
from braidlora.training.loss import Losses

ATTACKS = ("loss", "calibrated", "base")
_BATCH = 32
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Stratum:
    """Rows that are compared with each other: of one task, and in a federation of one client.

    Attributes:
        task: its name.
        held_in, held_out: per row the loss (mean over its targets) with and without the adapter, (rows, 2).
        left_out: how many held-out rows are training rows as well.
    """

    task: str
    held_in: Values
    held_out: Values
    left_out: int

    def losses(self, attack: str) -> tuple[Values, Values]:
        """What the attack goes by, for the held-in and the held-out rows: small for those that it takes for held-in."""
        weights = {"loss": (1.0, 0.0), "calibrated": (1.0, -1.0), "base": (0.0, 1.0)}[attack]
        return self.held_in @ weights, self.held_out @ weights


def measure_membership(
    path: Path, rows: int, *, recipe: str | Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The `membership` section of a run or an adapter, see docs/reference/analysis.md.

    Args:
        path: a run directory, a checkpoint, an adapter folder, or a client of a federation.
        rows: at most this many of each task, held in and held out.
        recipe: whose training and test rows they are; default: the run's own.
        overrides: `dotted.key=value` for the run's own recipe.

    Raises:
        ConfigError: a recipe is missing.
        DataError: no task has both training and other rows, or the run's training rows have changed.
        CheckpointError: the adapter is damaged or made for another base.
    """
    config = None if recipe is None else load_config(recipe, list(overrides), schema_of(recipe))
    loaded = load_for_evaluation(path, config, () if config is not None else overrides)
    run = run_around(path)
    trained = None if run is None or config is not None else of_run(run, path, loaded)
    notes = trained.too_few(rows) if trained is not None else []
    return section_of(strata(loaded, loaded.tasks, rows, trained), str(path), notes)


def measure_federation(
    directory: FederatedDirectory, rows: int, overrides: Sequence[str], only: str | None = None
) -> dict[str, Any]:
    """The `membership` section of a finished federation: every client's own rows, at its own model.

    Args:
        only: a client; default: all of them.

    Raises:
        DataError: the rows are not the federation's, or no client has both training and test rows.
        CheckpointError: as `final_models`.
    """
    found: list[Stratum] = []
    notes: list[str] = []
    experiment, saved = last_round(directory)
    for client, host in final_models(directory, overrides, only):
        loaded = Loaded(host.model.eval(), host.tokenizer, host.config, client.tasks, host.label_space)
        seen, rounds = trained_rows(experiment, saved, client, host)
        when = f"in the {rounds} rounds that count"
        trained = TrainedRows(host.rows(client), seen, when, f"client {client.name}, ")
        notes += trained.too_few(rows)
        found += strata(loaded, client.tasks, rows, trained)
    return section_of(found, str(directory.path), notes)


def strata(
    loaded: Loaded, tasks: Sequence[Task], rows: int, trained: TrainedRows | None = None
) -> list[Stratum]:
    """The losses of up to `rows` training rows of each task and as many others, drawn with the recipe's seed.

    Args:
        trained: which of the training rows the model was trained on; None if on all of them.
    """
    found = []
    for task in tasks:
        contents = {_content(row) for row in task.train}
        others = [*task.test, *task.validation]
        held_out = [row for row in others if _content(row) not in contents]
        if not task.train or not held_out:
            continue
        draw = random.Random(f"{loaded.config.seed}/{task.name}/membership")
        if trained is None:
            held_in = _encoded(loaded, task, draw.sample(task.train, min(rows, len(task.train))))
        else:
            seen = trained.of(task.name)
            held_in = [trained.rows[index] for index in draw.sample(seen, min(rows, len(seen)))]
        others_drawn = draw.sample(held_out, min(rows, len(held_out)))
        losses = [_losses(loaded, task, part) for part in (held_in, _encoded(loaded, task, others_drawn))]
        if all(len(part) for part in losses):
            found.append(Stratum(task.name, losses[0], losses[1], len(others) - len(held_out)))
    return found


def section_of(found: Sequence[Stratum], where: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The section, from the losses and the notes on tasks with too few rows."""
    if not found:
        why = "".join(f" {note[:1].upper()}{note[1:]}." for note in notes)
        raise DataError(
            f"{where}: membership needs rows that were trained on, and test or validation rows that are not trained "
            "on, of one task at least. Add `test` or `split.test` to the recipe and train, or give a recipe that names "
            f"them (--recipe).{why}"
        )
    tasks: dict[str, list[Stratum]] = {}
    for stratum in found:
        tasks.setdefault(stratum.task, []).append(stratum)
    whole = _part(found)
    by_task = {name: _part(of) for name, of in tasks.items()}
    return {**whole, "verdict": _verdict(whole), "notes": list(notes), "tasks": by_task}


def _part(found: Sequence[Stratum]) -> dict[str, Any]:
    attacks = {
        attack: interval([auc(*stratum.losses(attack)) for stratum in found])._asdict() for attack in ATTACKS
    }
    return {
        "held_in": sum(len(one.held_in) for one in found),
        "held_out": sum(len(one.held_out) for one in found),
        "left_out": sum(one.left_out for one in found),
        **attacks,
        "mean_loss": {
            "held_in": float(np.concatenate([one.held_in[:, 0] for one in found]).mean()),
            "held_out": float(np.concatenate([one.held_out[:, 0] for one in found]).mean()),
        },
    }


class Auc(NamedTuple):
    """An AUC, and the numbers of rows behind it."""

    value: float
    held_in: int
    held_out: int


class Interval(NamedTuple):
    """An AUC with its 95% confidence interval."""

    auc: float
    low: float
    high: float


def auc(held_in: Values, held_out: Values) -> Auc:
    """P(loss of a held-in row < loss of a held-out row), ties counting half, by ranks."""
    m, n = len(held_in), len(held_out)
    ranks = rankdata(np.concatenate([held_in, held_out]))
    smaller = m * n + m * (m + 1) / 2 - ranks[:m].sum()
    return Auc(float(smaller / (m * n)), m, n)


def interval(parts: Iterable[Auc], level: float = 0.95) -> Interval:
    """The mean AUC over strata, weighted by m n / (m + n), with a score interval.

    The bounds are the θ at which the mean is z standard errors away, with Hanley and McNeil's variance at θ (Newcombe,
    Statistics in Medicine 25, 2006, method 5, for one stratum). So the interval has a length at an AUC of 1 as well.
    """
    parts = list(parts)
    weights = [one.held_in * one.held_out / (one.held_in + one.held_out) for one in parts]
    weights = [weight / math.fsum(weights) for weight in weights]
    mean = math.fsum(weight * one.value for weight, one in zip(weights, parts, strict=True))
    z = float(norm.ppf(0.5 + level / 2))

    def distance(theta: float) -> float:
        variance = math.fsum(w**2 * _variance(theta, one) for w, one in zip(weights, parts, strict=True))
        return (mean - theta) ** 2 - z**2 * variance

    # At 0 and 1 the variance is 0, which would be a root as well.
    inside = min(max(mean, 1e-9), 1.0 - 1e-9)
    low = 0.0 if mean == 0.0 else float(brentq(distance, 0.0, inside))
    high = 1.0 if mean == 1.0 else float(brentq(distance, inside, 1.0))
    return Interval(mean, low, high)


def _variance(theta: float, one: Auc) -> float:
    """Of an AUC whose true value is θ (Hanley and McNeil, Radiology 143, 1982), with equal sizes in its brackets."""
    mean = (one.held_in + one.held_out) / 2
    inner = 1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return theta * (1 - theta) * inner / (one.held_in * one.held_out)


def _encoded(loaded: Loaded, task: Task, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of a task as in training. Those that are too long drop."""
    # The other tasks stay, without rows, so that task ids, labels and masks are the same as in training.
    alone = [replace(one, train=list(rows) if one.name == task.name else []) for one in loaded.tasks]
    data = encode_tasks(alone, loaded.tokenizer, loaded.config.prompt, "train", loaded.label_space)
    return [data[index] for index in range(len(data))]


@torch.no_grad()
def _losses(loaded: Loaded, task: Task, rows: Sequence[dict[str, Any]]) -> Values:
    """Per encoded row the mean loss over its targets, with and without the adapter, (rows, 2)."""
    config, model = loaded.config, loaded.model
    encoded = sorted(rows, key=lambda one: len(one["input_ids"]))
    collate = Collator(loaded.tokenizer.pad_token_id, config.kind)
    found = []
    for start in range(0, len(encoded), _BATCH):
        batch = {
            key: value.to(model.device) for key, value in collate(encoded[start : start + _BATCH]).items()
        }
        labels, task_id = batch.pop("labels"), batch.pop("task_id")
        with for_tasks(task.name):
            columns = [_row_losses(model, batch, labels, task_id, loaded)]
            with model.disable_adapter():
                columns.append(_row_losses(model, batch, labels, task_id, loaded))
        found.append(np.stack(columns, 1))
    return np.concatenate(found) if found else np.empty((0, 2))


def _row_losses(model: Any, batch: Any, labels: Any, task_id: Any, loaded: Loaded) -> Values:
    sums, counts = Losses(model(**batch).logits, labels, task_id, loaded.label_space).rows()
    means: Values = (sums.double() / counts.clamp(min=1)).cpu().numpy()
    return means


def _content(row: Row) -> str:
    """A row's texts, to recognize it."""
    return repr(sorted((str(key), str(value)) for key, value in row.items()))


def _verdict(part: dict[str, Any]) -> str:
    loss, base, calibrated = (part[attack] for attack in ("loss", "base", "calibrated"))
    if base["low"] > 0.5 or base["high"] < 0.5:
        if calibrated["low"] > 0.5:
            return (
                "leak: relative to the base model, training rows have smaller losses than others (the base model alone "
                "tells them apart as well, so the plain loss says little here)"
            )
        return (
            "undecided: the base model alone tells held-in from held-out rows, so they differ in themselves; give "
            "held-out rows from the same source"
        )
    if loss["low"] > 0.5 or calibrated["low"] > 0.5:
        return "leak: training rows have smaller losses than others"
    return "no leak found: this attack does not tell training rows from others better than chance"


def check_recipe(recipe: str | Path | None, needed: bool, given: str) -> None:
    """Raise ConfigError where a recipe is missing, or given for a run that has its own."""
    if needed and recipe is None:
        raise ConfigError(
            f"{given}: an adapter folder does not record its rows; name a recipe whose `train` rows it was trained on "
            "and whose `test` rows it was not: --recipe RECIPE."
        )
    if not needed and recipe is not None:
        raise ConfigError(f"--recipe: {given} has a recipe of its own; change it with overrides instead.")
