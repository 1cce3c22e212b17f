"""A comparison as one plain JSON file that others can check: everything that makes the numbers, and the numbers.

Without rows, predictions, weights and folders of this machine, except where the recipe itself names them.
`scripts/check_cell.py` reruns one of its cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError, ConfigError, TrainingError, explain_write_failures
from braidlora.json_text import loads
from braidlora.paths import expanded
from braidlora.runs import atomic_write_json

KIND = "submission"
LEAST_SEEDS = 3  # with fewer there is no interval worth its name
_SAME = ("format", "recipe", "command", "seeds", "baseline", "confidence", "settings", "sweep", "environment", "memory",
         "tasks", "base", "base_reason", "majority", "majority_reason", "warnings", "verdict")  # fmt: skip
_OF_A_ROW = ("name", "label", "overrides", "tuned", "tuning", "trainable_parameters", "seconds", "peak_memory_mib",
             "seeds", "validation_losses", "tasks", "mean", "collapsed", "worst", "delta_m", "delta_m_reason",
             "difference", "difference_reason")  # fmt: skip


def submission(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file.

    Args:
        comparison: the content of `comparison.json`.

    Raises:
        TrainingError: runs failed, so the table is not complete.
    """
    if comparison["failed"]:
        runs = ", ".join(one["run"] for one in comparison["failed"])
        raise TrainingError(
            f"--submit: these runs failed, so nothing was written: {runs}. Run the same command again; finished "
            "runs are kept."
        )
    data = {
        task: {part: {key: about[key] for key in ("rows", "sha256")} for part, about in parts.items()}
        for task, parts in comparison["data"].items()
    }
    return {
        "kind": KIND,
        **{key: comparison[key] for key in _SAME},
        "data": data,
        "references": {key: comparison["references"][key] for key in ("scores", "reason")},
        "rows": [{key: row[key] for key in _OF_A_ROW} for row in comparison["rows"]],
    }


def check_submission(path: str | Path, seeds: int) -> Path:
    """The file to write to, checked before anything is trained.

    Raises:
        ConfigError: too few seeds for an interval, a folder, or a file that is not a submission.
    """
    place = expanded(path)
    if seeds < LEAST_SEEDS:
        raise ConfigError(
            f"--submit: got {seeds} seed{'s' * (seeds != 1)}; expected at least {LEAST_SEEDS}, so that a rerun can be "
            "judged by an interval, e.g. --seeds 0,1,2,3,4."
        )
    if place.is_dir():
        raise ConfigError(f"--submit: {place} is a folder; give a file name, e.g. {place / 'table.json'}.")
    if place.exists():
        try:
            mine = loads(place.read_text(encoding="utf-8"))["kind"] == KIND
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            mine = False
        if not mine:
            raise ConfigError(
                f"--submit: {place} exists and is not a submission; it was not changed. Choose another name."
            )
    return place


def write_submission(comparison: Mapping[str, Any], place: Path) -> None:
    """Write the file, complete or not at all.

    Raises:
        TrainingError: runs failed, or the file cannot be written.
    """
    content = submission(comparison)
    with explain_write_failures(place, "or give another --submit"):
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(place, content)
