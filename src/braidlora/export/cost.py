"""What fixed expert weights cost: scores on the test rows with the router, and without."""

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
    """Scores of the adapter and of the LoRA that stands for it.

    Args:
        loaded: base and adapter; the adapter is taken off.
        lora: the LoRA's folder.
        tasks: those whose test rows are answered.
        run: the run the adapter belongs to. Its record is not touched, but rows that the same model has answered
            there are not answered again.

    Returns:
        `{"tasks": {name: {"metric", "n", "before", "after", "change"}}, "before", "after", "change"}`, the last three
        being means over the tasks; None without tasks.
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
    result: dict[str, Any] = metrics["tasks"]
    return result
