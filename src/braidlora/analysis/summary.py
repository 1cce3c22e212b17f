"""An analysis in a terminal: the means, beside what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.evaluation.table import format_table

_WIDEST = 8  # a larger matrix is left to the figure


def format_analysis(analysis: dict[str, Any]) -> str:
    """Tables of every section that the analysis has."""
    parts = []
    if analysis["similarity"]:
        parts += _similarity(analysis["similarity"])
    if analysis["drift"]:
        parts.append(_drift(analysis["drift"]))
    for label, routers in analysis.get("routers", {}).items():
        parts.append(f"{label} has no router." if routers is None else _routers(label, routers))
    parts += [_gradients(label, gradients) for label, gradients in analysis.get("gradients", {}).items()]
    return "\n\n".join(parts)


def number(value: float | None) -> str:
    """Three decimals; a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def _similarity(section: dict[str, Any]) -> list[str]:
    parts = []
    for factor, spaces in (("A", "row spaces"), ("B", "column spaces")):
        found = section[factor]
        if found is None:
            continue
        pairs, layers = found["pairs"], len(found["layers"])
        head = f"Similarity of {factor} ({spaces}, mean over {layers} layers; 1 is the same subspace)"
        if pairs["similarity"] is None:
            reason = next(iter(found["layers"][0]["reasons"].values()))
            parts.append(f"{head}: none to be had, {factor} is {reason}.")
            continue
        lines = [f"{head}: {number(pairs['similarity'])} between pairs, chance {number(pairs['chance'])}"]
        if len(found["elements"]) <= _WIDEST:
            lines += ["", _matrix(found["elements"], found["mean"])]
        parts.append("\n".join(lines))
    if section["left_out"]:
        left = ", ".join(f"{len(names)} of {label}" for label, names in section["left_out"].items())
        parts.append(f"Left out, since not all adapters have them: {left} layers (named in analysis.json).")
    return parts


def _matrix(labels: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> str:
    return format_table(
        ["", *labels], [[label, *map(number, row)] for label, row in zip(labels, matrix, strict=True)]
    )


def _drift(section: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    notes = []
    for label, drift in section.items():
        for change in drift["changes"]:
            if change["to"] != drift["stages"][-1]:
                continue
            missing = {factor: cell for factor, cell in change["mean"].items() if cell["direction"] is None}
            if missing:
                named = " and ".join("ΔW" if factor == "delta" else factor for factor in missing)
                notes.append(
                    f"{label}, {named} since {change['from']}: {next(iter(missing.values()))['reason']}."
                )
            for factor, cell in change["mean"].items():
                if factor in missing:
                    continue
                rows.append(
                    [
                        label, change["from"], "ΔW" if factor == "delta" else factor, number(cell["magnitude"]),
                        number(cell["direction"]), number(cell["similarity"]), number(cell["chance"]),
                    ]
                )  # fmt: skip
        notes += [f"{label}: {reason}." for reason in drift.get("reasons", {}).values()]
    header = ["run", "since", "", "magnitude", "direction", "similarity", "chance"]
    table = format_table(header, rows) if rows else "nothing saved to measure from"
    return "\n".join(
        ["Change up to the end (relative magnitude; direction is 1 − cosine, by columns)", table, *notes]
    )


def _routers(label: str, section: dict[str, Any]) -> str:
    mean = section["mean"]
    rows = [
        [task, section["rows"][task], number(mean["entropy"][at]), number(mean["token_entropy"][at])]
        for at, task in enumerate(section["tasks"])
    ]
    table = format_table(["task", "rows", "entropy", "entropy of a token"], rows)
    differ = mean["layers_where_tasks_differ"]
    lines = [f"Routers of {label} ({section['experts']} experts; entropy 1: all alike, 0: one alone)", table]
    if mean["distance"] is not None:
        lines.append(
            f"Tasks prefer different experts in {differ} of {len(section['layers'])} layers; their mean weights lie "
            f"{number(mean['distance'])} apart (0 alike, 1 disjoint)."
        )
    return "\n".join(lines)


def _gradients(label: str, section: dict[str, Any]) -> str:
    of = section["of"]
    rows = [
        [
            factor, "yes" if factor in section["shared"] else "no", number(found["between"]),
            number(found["within"]), f"{min(found['norm']):.3g} to {max(found['norm']):.3g}",
        ]
        for factor, found in section["factors"].items()
    ]  # fmt: skip
    table = format_table(["", "shared", f"cosine between {of}s", f"within a {of}", "norms"], rows)
    reasons = [
        f"{factor}: {found['reason']}." for factor, found in section["factors"].items() if "reason" in found
    ]
    return "\n".join([f"Gradients of {label} (dropout {section['dropout']})", table, *reasons])
