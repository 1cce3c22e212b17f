"""Text about the clients that a federation's `metrics.json` lists as failing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 20


def failing_lines(metrics: Mapping[str, Any]) -> list[str]:
    """One line for each client that was left out of rounds; clients that never took part come first."""
    failing = sorted(metrics.get("failing", {}).items(), key=lambda item: item[1]["trained"] > 0)
    lines = [
        (f"client {name} NEVER PARTICIPATED: " if not one["trained"] else f"client {name} ")
        + f"failed in {'round' if len(one['left_out']) == 1 else 'rounds'} {listed_rounds(one['left_out'])}"
        f" and was left out; last: {one['last']}"
        for name, one in failing[:_SHOWN]
    ]
    if failing[_SHOWN:]:
        lines.append(f"and {len(failing) - _SHOWN} more clients were left out of rounds; see rounds.jsonl")
    return lines


def listed_rounds(rounds: list[int]) -> str:
    """Round numbers as text, of which only the first are listed if there are many."""
    return ", ".join(map(str, rounds[:_SHOWN])) + (
        f" and {len(rounds) - _SHOWN} more" if rounds[_SHOWN:] else ""
    )
