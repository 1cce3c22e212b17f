"""`braidlora demo`: LoRA, HydraLoRA and ALoRA on eight generated tasks, three seeds each."""

from __future__ import annotations

from typing import Any

from braidlora.comparison import compare
from braidlora.config import RunConfig

METHODS = ("lora", "hydralora", "alora")
SEEDS = (0, 1, 2)


def demo(
    recipe: RunConfig,
    *,
    single_task: bool = False,
    overwrite: bool = False,
    report: bool = True,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Compare three methods on the `demo` recipe; nine runs, a few minutes on two cores.

    An interrupted demo resumes and a finished one is shown again, unless `overwrite` is set.

    Args:
        recipe: the `demo` recipe, with any overrides applied.
        single_task: also train the 24 single-task LoRAs that Δm% needs.
        overwrite: discard an earlier demo and start over.
        report: also write `report.html`.
        command: the command line that the tables quote.
        progress: print one line per run to stderr.

    Returns:
        the contents of `comparison.json` in the recipe's `output`.
    """
    return compare(
        recipe,
        name="demo",
        methods=METHODS,
        seeds=SEEDS,
        references="single-task" if single_task else "none",
        overwrite=overwrite,
        report=report,
        command=command,
        progress=progress,
    )
