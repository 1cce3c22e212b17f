"""The run that a comparison's verdict recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.comparison._advice import advise
from braidlora.errors import CheckpointError, ConfigError
from braidlora.paths import expanded
from braidlora.runs import COMPARISON, comparison_cells, covered, read_covered_json, read_json


def best_run(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The run to ship of a finished comparison, and its advice (`advise`).

    Raises:
        ConfigError: the folder is not a comparison, or its verdict recommends no method.
        CheckpointError: the comparison is not finished, or its numbers have changed since they were written.
    """
    folder = expanded(directory)
    if comparison_cells(folder) is None:
        raise ConfigError(f"{directory}: --best takes the directory of a comparison (`braidlora compare`).")
    if not (folder / COMPARISON).is_file():
        raise CheckpointError(
            f"{directory}: this comparison is not finished, so it has no verdict. The same `braidlora compare` command "
            "resumes it."
        )
    listed = COMPARISON in (covered(folder) or {})
    comparison = read_covered_json(folder, COMPARISON) if listed else read_json(folder / COMPARISON)
    advice = comparison.get("advice") or advise(comparison)
    if advice["run"] is None:
        raise ConfigError(f"{directory}: the verdict recommends no method. {advice['what']} {advice['next']}")
    return folder / advice["run"], advice
