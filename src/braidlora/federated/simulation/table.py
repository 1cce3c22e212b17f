"""A federation's metrics as a plain-text table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braidlora.runs import failing_lines, listed_rounds, privacy_lines
from braidlora.tables import format_bytes, text_table

_SHOWN = 20  # clients; if there are more, the worst


def format_federation(metrics: Mapping[str, Any]) -> str:
    """One row per client: scores before and after its last training and of the aggregated model; then the means."""
    clients: Mapping[str, Mapping[str, Any]] = metrics["clients"]
    names = sorted(clients)
    if len(names) > _SHOWN:
        names.sort(key=lambda name: (clients[name]["mean"] is None, clients[name]["mean"]))
    columns = ["rank", "rows", "rounds", "before", "after", "aggregated"]
    rows: list[list[object]] = [
        [name, *(clients[name][column] for column in columns)] for name in names[:_SHOWN]
    ]
    means = [metrics["before"]["mean"], metrics["after"]["mean"], metrics["mean"]]
    rows.append([f"mean of {len(clients)}", None, None, None, *means])
    header = ["client", *columns]
    lines = [text_table(header, rows, rules=[len(rows) - 1]), ""]
    if len(clients) > _SHOWN:
        lines.append(f"the {_SHOWN} worst of {len(clients)} clients are shown")
    if metrics["worst"] is not None:
        lines.append(
            f"worst client {metrics['worst_client']} ({metrics['worst']:.1f}), spread over clients (std) "
            f"{metrics['std']:.1f}"
        )
    if "common" in metrics:
        common = metrics["common"]
        lines.append(
            f"common test {_score(common['aggregated'])} (before {_score(common['before'])}, after "
            f"{_score(common['after'])})"
        )
        if left_out := common.get("left_out"):
            shown = [f"{name} ({', '.join(tasks)})" for name, tasks in list(left_out.items())[:_SHOWN]]
            lines.append(
                f"not in the common test, because their own heads were not trained for it: {', '.join(shown)}"
            )
    if metrics["delta_m"] is not None:
        lines.append(f"Δm% {metrics['delta_m']:+.2f} relative to clients that train alone (lower is better)")
    elif metrics["delta_m_reason"]:
        lines.append(f"Δm% not available: {metrics['delta_m_reason']}")
    if metrics["skipped"]:
        lines.append(
            f"rounds without enough clients, which were skipped: {listed_rounds(metrics['skipped'])}"
        )
    if "departed" in metrics:
        left = [f"{name} (after round {one['left_after']})" for name, one in metrics["departed"].items()]
        lines.append(f"left before the end, not scored: {', '.join(left)}")
    lines += failing_lines(metrics)
    lines += privacy_lines(metrics)
    sent = metrics["bytes"]
    lines.append(
        f"rule {metrics['rule']}, {metrics['rounds']} rounds, {metrics['seconds']:.0f} s; sent up "
        f"{format_bytes(sent['up'])}, down {format_bytes(sent['down'])}"
    )
    return "\n".join(lines)


def _score(value: float | None) -> str:
    """A score; a dash if no scored round has it."""
    return "–" if value is None else f"{value:.1f}"
