"""`braidlora demo`: train ALoRA on eight generated tasks and set its scores beside the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.config import load_config
from braidlora.evaluation.run import evaluate_tasks
from braidlora.evaluation.scoring import majority_score
from braidlora.evaluation.table import format_metrics
from braidlora.runs import RunDirectory, atomic_write_json
from braidlora.tasks import load_tasks
from braidlora.training.base import load_base
from braidlora.training.run import train


def demo(overrides: Sequence[str] = (), *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train the `demo` recipe, score base and adapter, and print the table.

    A demo that was stopped is carried on with, and a finished one is shown again, unless `overwrite` is set.

    Args:
        overrides: dotted overrides of the `demo` recipe.
        overwrite: start over where an earlier demo stands.
        quiet: print nothing, show no progress.

    Returns:
        `{"directory", "adapter": metrics, "base": metrics, "majority": {task: score}}`; also written to
        `demo.json` in the recipe's `output`, beside the run directory.
    """
    config = load_config("demo", overrides)
    root = RunDirectory.at(config.output).path
    config = config.model_copy(update={"output": str(root / str(config.adapter.method))})
    if not quiet:
        print(
            f"Training {config.adapter.method} on {len(config.tasks)} generated tasks, into {config.output}."
        )
    result = train(config, resume=None if overwrite else "auto", overwrite=overwrite, progress=not quiet)
    tasks = load_tasks(config)
    base, tokenizer = load_base(config.model, config.kind)
    before = evaluate_tasks(base, tokenizer, tasks, config, root / "base", progress=not quiet)
    majority = {task.name: majority_score(task) for task in tasks}
    report = {
        "directory": str(result.directory),
        "adapter": result.metrics,
        "base": before,
        "majority": majority,
    }
    atomic_write_json(root / "demo.json", report)
    if not quiet:
        columns = {
            "base": {name: task["score"] for name, task in before["tasks"].items()},
            "majority": majority,
        }
        print(format_metrics(result.metrics, columns))
        print(_verdict(result.metrics, columns))
        print(f"\nRun directory  {result.directory}\nAdapter        {result.directory / 'adapter'}")
    return report


def _verdict(metrics: dict[str, Any], columns: dict[str, dict[str, float]]) -> str:
    """By how much the adapter beats the better of base and majority answer, and where it does not."""
    margins = {
        name: task["score"] - max(column[name] for column in columns.values())
        for name, task in metrics["tasks"].items()
    }
    mean = sum(margins.values()) / len(margins)
    behind = [name for name, margin in margins.items() if margin <= 0]
    beaten = f" It is no better on {', '.join(behind)}." if behind else " It is better on every task."
    return (
        f"\nOn average the adapter is {mean:+.1f} points against the better of the base model and the most frequent "
        f"answer.{beaten}"
    )
