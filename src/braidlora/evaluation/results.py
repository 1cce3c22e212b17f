"""Where the results of an evaluation go, and `metrics.json`, which is written last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.config import dump_config
from braidlora.errors import CheckpointError, ConfigError
from braidlora.runs import (
    METRICS,
    PREDICTIONS,
    RunDirectory,
    atomic_write_text,
    cover,
    covered,
    is_leftover,
    is_lock,
    json_text,
)

if TYPE_CHECKING:
    from braidlora.models.loading import Found

_KEPT = ("seconds", "timing", "trainable_parameters")  # entries of a run's metrics.json that training wrote


def results_directory(found: Found) -> Path:
    """The folder that the results of evaluating `found` go into by default.

    A run's own evaluation goes into the run; with another recipe or overrides it goes into `evaluations/DIGEST` there,
    so that the run's record stays. An adapter's goes into `evaluation` in its folder, a base's into `OUTPUT-base` next
    to the recipe's run.
    """
    if found.adapter is None:
        return RunDirectory.at(f"{found.config.output}-base").path
    if found.run is None or not found.is_run:
        return found.adapter / "evaluation"
    if found.own_recipe:
        return found.run.path
    digest = hashlib.sha256(dump_config(found.config).encode()).hexdigest()[:8]
    return found.run.path / "evaluations" / digest


def training_record(run: RunDirectory) -> dict[str, Any]:
    """What training wrote into a run's `metrics.json`: how long it took, and trainable parameters.

    Raises:
        CheckpointError: the file is gone, though the manifest lists it.
    """
    metrics = run.metrics
    if metrics.is_file():
        before = run.read_json(metrics.name)
        return {key: before[key] for key in _KEPT if key in before}
    if metrics.name in (covered(run.path) or {}):
        raise CheckpointError(
            f"{metrics}: missing, though the manifest lists it; it also contains the results of training. `braidlora "
            f"train RECIPE --output={run.path} --resume auto` recreates it. To evaluate without it, "
            "use --directory=PATH."
        )
    return {}


def refuse_foreign_files(directory: Path) -> None:
    """Raise if results would be written among files that no evaluation wrote.

    Raises:
        ConfigError: with the first of these files.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(
            f"{directory}: is a file; give --directory a folder, or a path that does not exist."
        )
    names = {path.name for path in directory.glob("*") if not (is_leftover(path.name) or is_lock(path.name))}
    if names and not names & {PREDICTIONS, METRICS}:
        raise ConfigError(
            f"{directory}: contains files that no evaluation wrote ({', '.join(sorted(names)[:3])}, …); nothing there "
            "is touched. Give --directory an empty folder, or one with earlier results."
        )


def write_results(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, last; the directory's manifest lists it and the predictions."""
    text = json_text(metrics)
    predictions = sorted((directory / PREDICTIONS).glob("*.json*"))
    listed = [path.relative_to(directory).as_posix() for path in predictions]
    cover(directory, listed, {METRICS: text.encode()})
    atomic_write_text(directory / METRICS, text)
