"""What one run of a comparison looks like inside: its experts, their drift, and which of them serves whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.adapters.sharing import SCHEMES
from braidlora.comparison._results import RowRuns

_ROWS = 32  # of each task: enough for mean router weights, and seconds on a small base


def look_inside(rows: Sequence[RowRuns], threads: int | None) -> dict[str, Any] | None:
    """The analysis of one run with a router, as `analyze_run` gives it; None where no row has experts.

    It is ALoRA's first seed where there is one, else HydraLoRA's, else MoE-LoRA's: one run shows what to look at, and
    `braidlora analyze` takes any others.

    Args:
        rows: the finished runs.
        threads: how many the measurement may use, as in the runs.

    Raises:
        BraidloraError: as `analyze_run`.
    """
    from braidlora.analysis import analyze_run
    from braidlora.training.threads import cpu_threads

    for scheme in SCHEMES.values():
        for row in rows:
            cell = next(iter(row.cells.values()))
            if cell.config.adapter.method == scheme.method and cell.config.adapter.num_experts > 1:
                with cpu_threads(threads):
                    return analyze_run(cell.run.path, _ROWS)
    return None
