"""An analysis as plain text for the terminal: the means, next to the chance level."""

from __future__ import annotations

from functools import partial
from typing import Any

from braidlora.analysis.drift import FINAL
from braidlora.tables import number, text_table

_WIDEST = 8  # elements of a matrix; a larger one is left to the figure
_number = partial(number, digits=3)


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
    parts += [_membership(label, found) for label, found in analysis.get("membership", {}).items()]
    return "\n\n".join(parts)


def _membership(label: str, section: dict[str, Any]) -> str:
    def cells(part: dict[str, Any]) -> list[object]:
        attacks = [part[attack] for attack in ("loss", "calibrated", "base")]
        shown = [f"{one['auc']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in attacks]
        return [part["held_in"], part["held_out"], *shown]

    rows = [[task, *cells(part)] for task, part in section["tasks"].items()]
    rules = []
    if len(rows) > 1:
        rules = [len(rows)]
        rows.append(["all", *cells(section)])
    header = ["task", "held in", "held out", "AUC by loss", "by loss − base's", "base alone"]
    lines = [
        f"Membership in {label} (AUC and 95% CI of guessing which rows were trained on; 0.5 is chance)",
        text_table(header, rows, rules=rules),
        f"{section['verdict']}.",
    ]
    if section["left_out"]:
        lines.insert(
            2, f"{section['left_out']} held-out rows are training rows as well, and are not counted."
        )
    lines[2:2] = [f"{note}." for note in section["notes"]]
    return "\n".join(lines)


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
            parts.append(f"{head}: not defined, {factor} is {reason}.")
            continue
        lines = [f"{head}: {_number(pairs['similarity'])} between pairs, chance {_number(pairs['chance'])}"]
        if len(labels := found["elements"]) <= _WIDEST:
            rows = [[label, *map(_number, row)] for label, row in zip(labels, found["mean"], strict=True)]
            lines += ["", text_table(["", *labels], rows)]
        parts.append("\n".join(lines))
    if section["left_out"]:
        left = ", ".join(f"{len(names)} of {label}" for label, names in section["left_out"].items())
        parts.append(
            f"Left out, because not all adapters have them: {left} layers (listed in analysis.json)."
        )
    return parts


def _drift(section: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    notes = []
    for label, drift in section.items():
        for change in drift["changes"]:
            if change["to"] != drift["stages"][-1]:
                continue
            missing = {factor: mean for factor, mean in change["mean"].items() if mean["direction"] is None}
            if missing:
                named = " and ".join(map(_name, missing))
                reason = next(iter(missing.values()))["reason"]
                notes.append(f"{label}, {named} since {change['from']}: {reason}.")
            rows += [
                [label, change["from"], _name(factor)]
                + [_number(mean[key]) for key in ("magnitude", "direction", "similarity", "chance")]
                for factor, mean in change["mean"].items()
                if factor not in missing
            ]
        notes += [f"{label}: {reason}." for reason in drift.get("reasons", {}).values()]
        at = dict(zip(drift["stages"], drift["steps"], strict=True))
        if at.get(FINAL, drift["last_step"]) < drift["last_step"]:
            notes.append(
                f"{label}: measured up to {drift['stages'][-1]}; its adapter is that of step {at[FINAL]} of "
                f"{drift['last_step']}, which has the lowest validation loss (training.load_best)."
            )
    header = ["run", "since", "", "magnitude", "direction", "similarity", "chance"]
    table = text_table(header, rows, left=(0, 1, 2)) if rows else "no saved adapters to measure from"
    title = "Change by the end of training (relative magnitude; direction is 1 − cosine, by column)"
    return "\n".join([title, table, *notes])


def _name(factor: str) -> str:
    return "ΔW" if factor == "delta" else factor


def _routers(label: str, section: dict[str, Any]) -> str:
    mean = section["mean"]
    rows = [
        [task, section["rows"][task], _number(mean["entropy"][at]), _number(mean["token_entropy"][at])]
        for at, task in enumerate(section["tasks"])
    ]
    lines = [
        f"Routers of {label} ({section['experts']} experts; entropy 1: all experts equal, 0: only one used)",
        text_table(["task", "rows", "entropy", "entropy of a token"], rows),
    ]
    if mean["distance"] is not None:
        lines.append(
            f"Tasks prefer different experts in {mean['layers_where_tasks_differ']} of {len(section['layers'])} "
            f"layers; the distance between their mean weights is {_number(mean['distance'])} (0 identical, 1 disjoint)."
        )
    return "\n".join(lines)


def _gradients(label: str, section: dict[str, Any]) -> str:
    of = section["of"]
    rows = [
        [
            factor, "yes" if factor in section["shared"] else "no", _number(found["between"]),
            _number(found["within"]), f"{min(found['norm']):.3g} to {max(found['norm']):.3g}",
        ]
        for factor, found in section["factors"].items()
    ]  # fmt: skip
    header = ["", "shared", f"cosine between {of}s", f"within a {of}", "norms"]
    reasons = [
        f"{factor}: {found['reason']}." for factor, found in section["factors"].items() if "reason" in found
    ]
    title = f"Gradients of {label} (dropout {section['dropout']})"
    return "\n".join([title, text_table(header, rows, left=(0, 1)), *reasons])
