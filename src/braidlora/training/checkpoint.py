"""Which checkpoint to resume from, and whether it fits: intact, complete, of the same recipe, data and base."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braidlora.config import RunConfig, json_differences, recipe_differences
from braidlora.errors import CheckpointError
from braidlora.models.identity import base_differences
from braidlora.runs import (
    ADAPTER_CARD,
    IDENTITY,
    BaseRecord,
    Committed,
    IncompleteError,
    RunDirectory,
    environment,
    parse_adapter_card,
    quoted,
    warn_of_another_machine,
)
from braidlora.tasks import LabelSpace, MultiTaskDataset
from braidlora.training._trainer_compat import OPTIMIZER, SCHEDULER, rng_file

SAMPLER = "sampler.json"

# Settings that change no weight, so a resumed run may differ in them. The base is recognized by its fingerprint.
FREE = (
    "output", "model.path", "model.chat_template", "evaluation", "training.logging_steps", "training.report_to",
    "training.save_steps",
    "training.keep_checkpoints", "training.threads",
)  # fmt: skip


# These change only rounding, or how a step is split, so an inexact resume may change them.
INEXACT = ("training.batch_size", "training.gradient_accumulation", "training.gradient_checkpointing")


def progress_file(rank: int) -> str:
    """The file of process `rank` with its running sums: losses since the last log."""
    return f"progress_{rank}.json"


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same run."""

    config: dict[str, Any]
    data: dict[str, Any]
    base: dict[str, Any]
    world_size: int
    environment: dict[str, Any] = field(default_factory=environment)

    @classmethod
    def of(cls, config: RunConfig, data: Mapping[str, Any], base: BaseRecord, world_size: int) -> Identity:
        return cls(config.model_dump(mode="json"), dict(data), base.model_dump(mode="json"), world_size)


def encoded_fingerprint(rows: MultiTaskDataset) -> str:
    """sha256 over token ids, labels and task ids of encoded rows; it changes with tokenizer, template and cutoff."""
    digest = hashlib.sha256()
    for row in (rows[index] for index in range(len(rows))):
        for values in (row["input_ids"], row["labels"], row["task_id"]):
            digest.update(np.asarray(values, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()


class Checkpoint(Committed):
    """A verified checkpoint. `missing` are files of the state that an inexact resume does without."""

    missing: frozenset[str] = frozenset()

    def lists(self, name: str) -> bool:
        """Whether this file must be read; it is then an error if it is gone."""
        return super().lists(name) and name not in self.missing


def find_checkpoint(
    directory: RunDirectory,
    resume: Literal["auto"] | Path,
    world_size: int,
    *,
    allow_inexact: bool = False,
) -> Checkpoint | None:
    """The checkpoint to resume from, verified; None if `auto` finds none and the run starts from scratch.

    `auto` uses the newest one that was written completely, and warns of those it skips. A named checkpoint or run
    directory is used or rejected.

    Raises:
        CheckpointError: damaged, incomplete, or without the state an exact resume needs (unless `allow_inexact`).
    """
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such folder. --resume takes `auto`, a run directory, or one of its checkpoints."
            )
        inner = RunDirectory(path)
        if inner.checkpoint_steps():
            path = inner.checkpoint(inner.checkpoint_steps()[-1])
        try:
            return _verified(path, world_size, allow_inexact)
        except IncompleteError as error:
            raise CheckpointError(f"{error} Name an older checkpoint, or use --resume auto.") from None
    incomplete: list[str] = []
    for step in reversed(directory.checkpoint_steps()):
        path = directory.checkpoint(step)
        try:
            found = _verified(path, world_size, allow_inexact)
        except IncompleteError as error:
            incomplete.append(str(error))
            continue
        for problem in incomplete:
            warnings.warn(
                f"skipped an incomplete checkpoint, resuming from {path.name}: {problem}", stacklevel=2
            )
        return found
    if incomplete:
        raise CheckpointError(
            f"{directory.checkpoints}: no checkpoint is complete. {incomplete[0]} --overwrite starts over."
        )
    return None


def _verified(path: Path, world_size: int, allow_inexact: bool) -> Checkpoint:
    needed = {
        OPTIMIZER: "optimizer",
        SCHEDULER: "scheduler",
        SAMPLER: "sampler",
        **{rng_file(rank, world_size): "RNG" for rank in range(world_size)},
        **{progress_file(rank): "progress" for rank in range(world_size)},
    }
    try:
        checkpoint = Checkpoint(path)
        files = checkpoint.verify(optional=tuple(needed))
    except IncompleteError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Resume from an older checkpoint (--resume PATH), or remove this one."
        ) from None
    saved_by = checkpoint.read_json(IDENTITY)["world_size"]
    if saved_by != world_size and not allow_inexact:
        raise CheckpointError(
            f"{path}: saved by {saved_by} processes, resumed by {world_size}: rows would be in a different order. "
            f"Start {saved_by} processes, or accept the difference with --allow-inexact-resume."
        )
    missing = [f"{name} ({what} state)" for name, what in needed.items() if name not in files]
    if missing and not allow_inexact:
        raise CheckpointError(
            f"{path}: {', '.join(missing)} missing, so the run could not resume exactly. "
            "--allow-inexact-resume resumes without them."
        )
    if missing:
        warnings.warn(f"inexact resume from {path.name}: {', '.join(missing)} missing", stacklevel=3)
    checkpoint.missing = frozenset(name for name in needed if name not in files)
    return checkpoint


def check_identity(
    checkpoint: Checkpoint, current: Identity, sampled: str, *, allow_inexact: bool = False
) -> None:
    """Reject to resume another recipe, other data or another base; warn of other versions or threads.

    Args:
        checkpoint: to resume from.
        current: of the run that would resume.
        sampled: `sampled_fingerprint` of its base, for checkpoints of braidlora 0.1.
        allow_inexact: accept another split of a step into batches.

    Raises:
        CheckpointError: with every difference, the checkpoint's value and the present one.
    """
    saved = checkpoint.read_json(IDENTITY)
    free = FREE + (INEXACT if allow_inexact and _same_steps(saved["config"], current.config) else ())
    problems = [
        f"{key}: {old} in the checkpoint, {new} now"
        for key, old, new in recipe_differences(saved["config"], current.config, RunConfig)
        if not any(key == one or key.startswith(one + ".") for one in free)
    ]
    problems += [
        f"data of {key}: sha256 {str(old)[:12]}… in the checkpoint, {str(new)[:12]}… now"
        for key, old, new in json_differences(saved["data"], current.data)
    ]
    other_base, in_another_form = base_differences(saved["base"], BaseRecord(**current.base), sampled)
    problems += other_base
    if problems:
        raise CheckpointError(
            f"{checkpoint.directory}: belongs to another run.\n  "
            + "\n  ".join(problems)
            + "\nResume with the recipe and data it was started with, or start a new run with another --output."
        )
    for text in in_another_form:
        warnings.warn(f"resume may not be bit-exact: {text}", stacklevel=2)
    warn_of_another_machine(saved["environment"], current.environment)


def check_labels(checkpoint: Checkpoint, label_space: LabelSpace | None) -> None:
    """Reject a checkpoint whose head has its labels in another order than the run that would resume.

    Raises:
        CheckpointError: with both orders.
    """
    if label_space is None or not checkpoint.lists(ADAPTER_CARD):
        return
    path = checkpoint.directory
    card = parse_adapter_card(checkpoint.read(ADAPTER_CARD), path / ADAPTER_CARD)
    if (card.task_labels, card.labels) != (label_space.task_labels, label_space.names):
        raise CheckpointError(
            f"{path}: its head has the labels {quoted(card.labels or [])}, in this order; this run's are "
            f"{quoted(label_space.names)}. Resume with the labels in the checkpoint's order, or start a new run with "
            "another --output."
        )


def _same_steps(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a step has the same number of rows in both, so that every step still uses the same rows."""
    rows = [one["training"]["batch_size"] * one["training"]["gradient_accumulation"] for one in (old, new)]
    return bool(rows[0] == rows[1])
