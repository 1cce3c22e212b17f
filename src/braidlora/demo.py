"""`braidlora demo`: LoRA, HydraLoRA and ALoRA on eight generated tasks, three seeds each, beside the base model."""

from __future__ import annotations

from typing import Any

from braidlora.comparison import compare
from braidlora.config import RunConfig

METHODS = ("lora", "hydralora", "alora")
SEEDS = (0, 1, 2)


def demo(
    recipe: RunConfig,
    *,
    with_references: bool = False,
    overwrite: bool = False,
    report: bool = True,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Compare three methods on the `demo` recipe; nine runs, some minutes on two cores.

    A demo that was stopped is carried on with, and a finished one is shown again, unless `overwrite` is set.

    Args:
        recipe: the `demo` recipe, with overrides or without.
        with_references: train single-task LoRAs too, three times eight of them, which Δm% needs.
        overwrite: start over where an earlier demo stands.
        report: write `report.html` too.
        command: what the tables name as the command that made them.
        progress: one line for each run on stderr.

    Returns:
        what `comparison.json` in the recipe's `output` holds.
    """
    return compare(
        recipe,
        name="demo",
        methods=METHODS,
        seeds=SEEDS,
        references="single-task" if with_references else "none",
        overwrite=overwrite,
        report=report,
        command=command,
        progress=progress,
    )
