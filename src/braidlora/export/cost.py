"""The cost of fixed expert weights: scores on the test rows with the router and without it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from braidlora.evaluation.run import evaluate_tasks
from braidlora.models.adapter_reader import load_adapter
from braidlora.models.loading import Loaded
from braidlora.runs import RunDirectory
from braidlora.tasks import Task


def measure_cost(
    loaded: Loaded, lora: Path, tasks: Sequence[Task], run: RunDirectory | None, progress: bool
) -> dict[str, Any] | None:
    """Scores of the adapter and of the LoRA that replaces it.

    Args:
        loaded: base and adapter; the adapter is removed.
        lora: the LoRA's folder.
        tasks: scored on their test rows.
        run: the adapter's run. It is not changed; predictions of the same model there are reused.

    Returns:
        `{"tasks": {name: {"metric", "n", "before", "after", "change"}}, "before", "after", "change"}`, the last three
        are means over the tasks; None without tasks.
    """
    if not tasks:
        return None
    old = _scores(loaded, loaded.model, tasks, run, progress)
    new = _scores(loaded, load_adapter(loaded.model.unload(), lora).eval(), tasks, None, progress)
    changes = {
        name: {
            "metric": task["metric"],
            "n": task["n"],
            "before": task["score"],
            "after": new[name]["score"],
            "change": new[name]["score"] - task["score"],
        }
        for name, task in old.items()
    }
    means = {
        key: sum(change[key] for change in changes.values()) / len(changes)
        for key in ("before", "after", "change")
    }
    return {"tasks": changes, **means}


def _scores(
    loaded: Loaded, model: Any, tasks: Sequence[Task], run: RunDirectory | None, progress: bool
) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        if run is not None and run.predictions.is_dir():
            shutil.copytree(run.predictions, Path(folder) / run.predictions.name)
        metrics = evaluate_tasks(
            model,
            loaded.tokenizer,
            tasks,
            loaded.config,
            Path(folder),
            label_space=loaded.label_space,
            progress=progress,
        )
    return metrics["tasks"]
