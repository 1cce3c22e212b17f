"""Tables of score against ε for `document_results.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from braidlora.tables import markdown_table
from leaderboard_tables import paired

_BASELINE = "fedit"


def privacy(result: dict[str, Any]) -> str:
    """Scores by rule and ε, what the noise costs, the distance from FedIT, and the error of ΔW; without the command."""
    cells = result["cells"]
    finite = sorted({one["epsilon"] for one in cells if one["epsilon"] is not None}, reverse=True)
    scores = _scores(cells)
    names = [f"{label} (`{rule}`)" for rule, label in result["rules"].items()]
    table = [
        [name, *(_spread(scores.get((rule, epsilon), []), result["seeds"]) for epsilon in (None, *finite))]
        for name, rule in zip(names, result["rules"], strict=True)
    ]
    costs = [
        [name, *(_difference(scores, (rule, epsilon), (rule, None)) for epsilon in finite)]
        for name, rule in zip(names, result["rules"], strict=True)
    ]
    distances = [
        [name, *(_difference(scores, (rule, epsilon), (_BASELINE, epsilon)) for epsilon in (None, *finite))]
        for name, rule in zip(names, result["rules"], strict=True)
        if rule != _BASELINE
    ]
    given = [f"ε = {epsilon:g}" for epsilon in finite]
    parts = [
        markdown_table(["rule", "ε = ∞ (clipped, no noise)", *given], table),
        _note(cells),
        "Points relative to ε = ∞, paired by seed, with 95% CIs over seeds:",
        markdown_table(["rule", *given], costs),
        "Points relative to FedIT at the same ε:",
        markdown_table(["rule", "ε = ∞", *given], distances),
        *_error_of_noise(result),
    ]
    return "\n\n".join(part.strip() for part in parts)


def _scores(cells: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], list[float]]:
    """The scores of each rule at each ε, in the order of the seeds."""
    found: dict[tuple[str, float | None], list[float]] = {}
    for one in sorted(cells, key=lambda one: one["seed"]):
        found.setdefault((one["rule"], one["epsilon"]), []).append(one["score"])
    return found


def _spread(values: Sequence[float], seeds: Sequence[int]) -> str:
    """Mean ± standard deviation, and how many seeds are missing; a cell that was not run has a dash."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    few = f" ({len(values)} of {len(seeds)} seeds)" if len(values) < len(seeds) else ""
    return f"{statistics.fmean(values):.1f}{spread}{few}"


def _difference(
    scores: dict[tuple[str, float | None], list[float]],
    one: tuple[str, float | None],
    other: tuple[str, float | None],
) -> str:
    found = paired(scores.get(one, []), scores.get(other, []))
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def _note(cells: Sequence[dict[str, Any]]) -> str:
    noise = {
        one["epsilon"]: one["privacy"]["noise_multiplier"] for one in cells if one["epsilon"] is not None
    }
    shown = ", ".join(f"{z:.2f} for ε = {epsilon:g}" for epsilon, z in sorted(noise.items()))
    one = cells[0]["privacy"]
    return (
        f"Mean accuracy of the clients' aggregated models. {one['clients']} clients, each drawn with probability "
        f"{one['sampling']:g}; {one['releases']} rounds; C = {one['clip']:g}; δ = {one['delta']:g}; noise multiplier "
        f"{shown or 'none'}."
    )


def _error_of_noise(result: dict[str, Any]) -> list[str]:
    """How far one round's noise moves ΔW, by rule: seed by seed the mean over the finite ε."""
    rows = []
    for rule, label in result["rules"].items():
        found = [
            one["error_of_noise"] for one in result["cells"] if one["rule"] == rule and one["error_of_noise"]
        ]
        if found:
            times = list(found[0])
            growth = [statistics.fmean(one[n] / one["1"] for one in found) for n in times]
            first = statistics.fmean(one["1"] for one in found)
            rows.append([f"{label} (`{rule}`)", f"{first:.2f}", *(f"{value:.2f}" for value in growth[1:])])
    if not rows:
        return []
    header = [
        "rule",
        "‖ΔW with one round's noise − ΔW‖ / ‖ΔW‖",
        *(f"× at {n} times the noise" for n in times[1:]),
    ]
    return ["How far the noise of one round moves ΔW:", markdown_table(header, rows)]
