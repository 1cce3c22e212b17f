"""A federation's privacy in words, for the command line and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braidlora.tables import epsilon_text


def privacy_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences about `privacy` in metrics.json; none without it."""
    found = metrics.get("privacy")
    if found is None:
        return []
    at_clients = found["noise"] == "clients"
    where = "by every client to its own change" if at_clients else "by the server to the sum"
    how = (
        f"changes clipped to {found['clip']:g}, noise of {found['noise_multiplier']:.4g} times that, added {where}, "
        f"{found['releases']} releases, each of {found['clients']} clients drawn with probability {found['sampling']:g}"
    )
    if not found["guarantee"]:
        return [f"privacy: no guarantee: {found['why_not']}; {how}"]
    lines = [
        f"privacy: ε = {epsilon_text(found['epsilon'])} at δ = {found['delta']:g} toward everyone but the server "
        f"({found['neighbors']}); {how}"
    ]
    if at_clients:
        lines.append(
            f"privacy: ε = {epsilon_text(found['epsilon_server'])} toward a server that follows the protocol; the "
            "scores on test rows that clients send are not covered"
        )
    else:
        lines.append("privacy: the server is trusted: it receives every client's change without noise")
    return lines
