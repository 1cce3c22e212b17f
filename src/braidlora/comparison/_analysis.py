"""The analysis of one run of a comparison: its experts, their drift, and which expert serves which task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.adapters.sharing import SCHEMES
from braidlora.analysis import analyze_run
from braidlora.comparison._results import RowRuns
from braidlora.training.threads import cpu_threads

_ROWS = 32  # of each task: enough for mean router weights, and seconds on a small base


def analyze_one_run(rows: Sequence[RowRuns], threads: int | None) -> dict[str, Any] | None:
    """The analysis of one run with a router, as `analyze_run` returns it; None if no row has experts.

    It is the first seed of ALoRA, else of HydraLoRA, else of MoE-LoRA: one run as an example; `braidlora analyze` takes
    any others.

    Args:
        rows: the finished runs.
        threads: of the measurement, as in the runs.

    Raises:
        BraidloraError: as `analyze_run`.
    """
    for scheme in SCHEMES.values():
        for row in rows:
            cell = next(iter(row.cells.values()))
            if cell.config.adapter.method == scheme.method and cell.config.adapter.num_experts > 1:
                with cpu_threads(threads):
                    return analyze_run(cell.run.path, _ROWS)
    return None
