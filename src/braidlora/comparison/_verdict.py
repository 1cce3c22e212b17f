"""A comparison in plain sentences: which method is best, whether that is significant, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.comparison.statistics import t_quantile
from braidlora.reporting.significance import mark
from braidlora.tables import plural, spread

_MANY = 10  # CIs of single tasks from which on chance deserves a sentence
_FEW_CORRECT = 10  # correct answers of a single-task LoRA below which single ones decide Δm%
_SEVERAL = 3  # methods against one baseline from which on it does, too


def verdict(comparison: Mapping[str, Any], advice: Mapping[str, Any]) -> list[str]:
    """All sentences about a comparison: first the advice with its findings, then the details."""
    return [*headline(advice), *advice["findings"], *details(comparison)]


def headline(advice: Mapping[str, Any]) -> list[str]:
    """What to use, with what confidence, what to do next: one line each."""
    return [advice["what"], f"Confidence: {advice['sure']}", f"Next: {advice['next']}"]


def details(comparison: Mapping[str, Any]) -> list[str]:
    """Each method against the baseline; they claim a difference only if its interval excludes 0."""
    rows, confidence = comparison["rows"], comparison["confidence"]
    base = next((row for row in rows if row["name"] == comparison["baseline"]), None)
    sentences = [_below_majority(comparison) or _best(rows, base)]
    for row in rows:
        if row["difference"] is not None and base is not None:
            sentences.append(_against(row, base, confidence))
        elif row is not base:
            sentences.append(
                f"{row['label']} cannot be compared with the baseline: {row['difference_reason']}."
            )
    sentences += _chance(rows, base, confidence)
    sentences += _cost(rows, base)
    sentences += _balance(rows, confidence)
    sentences += _unstable(comparison)
    return sentences


def _below_majority(comparison: Mapping[str, Any]) -> str | None:
    """Where the most frequent answer scores as much as every method, "the highest mean score" would praise chance."""
    majority = (comparison.get("majority") or {}).get("mean")
    best = max(comparison["rows"], key=lambda row: row["mean"]["mean"])
    if majority is None or best["mean"]["mean"] > majority:
        return None
    return (
        f"No method beats the most frequent answer, which scores {majority:.1f}; the highest is {best['label']} with "
        f"{spread(best['mean'])} over {plural(len(best['seeds']), 'seed')}."
    )


def _best(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> str:
    best = max(rows, key=lambda row: row["mean"]["mean"])
    has = "has the highest mean score," if len(rows) > 1 else "scores"
    text = f"{best['label']} {has} {spread(best['mean'])} over {plural(len(best['seeds']), 'seed')}"
    if len(best["tasks"]) > 1:
        text += f", and {spread(best['worst'])} on its worst task ({', '.join(dict.fromkeys(best['worst']['tasks']))})"
    better, same = "; it is significantly better than ", "; but it is not significantly different from "
    if best is base:
        judged = [row for row in rows if not row.get("collapsed")]  # a collapsed run allows no conclusion
        compared = [row for row in judged if row["difference"] is not None]
        close = [row["label"] for row in compared if not mark(row["difference"])]
        if not compared:
            return text + "."
        if not close:
            every = len(compared) == len(rows) - 1
            others = "every other method" if every else ", ".join(row["label"] for row in compared)
            return f"{text}{better}{others}."
        if len(close) == len(compared) > 1:
            return f"{text}{same}any other method."
        return f"{text}{same}{' or '.join(close)}."
    if base is None or best["difference"] is None:
        return text + "."
    return f"{text}{better if mark(best['difference']) else same}{base['label']}."


def _against(row: Mapping[str, Any], base: Mapping[str, Any], confidence: float) -> str:
    difference = row["difference"]
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    numbers = f"({mean:+.1f} points, {confidence:.0%} CI {low:+.1f} to {high:+.1f})"
    if not difference.get("judged", True):
        return f"No conclusion about {row['label']} compared with {base['label']} {numbers}: a run collapsed."
    words = {"above": "significantly better than", "below": "significantly worse than"}
    is_ = words.get(mark(difference), "not significantly different from")
    text = f"{row['label']} is {is_} {base['label']} {numbers}"
    gains, losses = _significant_tasks(difference)
    if gains:
        text += f"; it gains on {_listed(gains)}"
    if losses:
        text += f"{' and' if gains else '; it'} loses on {_listed(losses)}"
    return text + "."


def _significant_tasks(difference: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Tasks whose interval excludes 0: gains and losses."""
    tasks = difference["tasks"].items() if difference.get("judged", True) else ()
    gains = {task: one["mean"] for task, one in tasks if mark(one) == "above"}
    losses = {task: one["mean"] for task, one in tasks if mark(one) == "below"}
    return gains, losses


def _chance(
    rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, confidence: float
) -> list[str]:
    """How many significant results chance alone would give."""
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    sentences = []
    if base is not None and len(compared) >= _SEVERAL and any(map(mark, compared)):
        sentences.append(
            f"CIs are not corrected for multiple comparisons: if no method differed, at least one of {len(compared)} "
            f"would still exclude 0 in up to {1 - confidence ** len(compared):.0%} of such comparisons."
        )
    tested = sum(len(difference["tasks"]) for difference in compared)
    if tested >= _MANY and any(any(_significant_tasks(difference)) for difference in compared):
        sentences.append(
            f"Tasks are tested separately: of {tested} such CIs, about {(1 - confidence) * tested:.0f} would exclude 0 "
            "by chance even if no method differed."
        )
    return sentences


def _cost(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[str]:
    others = [row for row in rows if row is not base]
    if base is None or not others:
        return []
    parameters, seconds = base["trainable_parameters"], base["seconds"]["mean"]
    ratios = "; ".join(
        f"{row['label']} {row['trainable_parameters'] / parameters:.2f} and {row['seconds']['mean'] / seconds:.2f}"
        for row in others
    )
    return [
        f"Cost relative to {base['label']} in trainable parameters ({parameters:,}) and seconds per run "
        f"({seconds:.0f}): {ratios}."
    ]


def _balance(rows: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    known = [row for row in rows if row["delta_m"] is not None]
    if not known and all(len(row["tasks"]) == 1 for row in rows):
        return []  # with one task, the row `lora` is the single-task LoRA
    if not known:
        return [
            f"Δm% is not available: {reason}."
            for reason in dict.fromkeys(row["delta_m_reason"] for row in rows)
        ]
    best = min(known, key=lambda row: row["delta_m"]["mean"])
    word = "worse" if best["delta_m"]["mean"] > 0 else "better"
    text = (
        f"Compared with single-task LoRAs, {best['label']} does best: Δm% {spread(best['delta_m'], sign=True)}, on "
        f"average {word} than models trained on one task each"
    )
    margin = _margin(best["delta_m"], confidence)
    if margin is not None and abs(best["delta_m"]["mean"]) <= margin:
        text += f"; but with this spread over seeds, that is not significantly different from 0 (± {margin:.1f} at "
        text += f"{confidence:.0%})"
    return [text + "."]


def _unstable(comparison: Mapping[str, Any]) -> list[str]:
    """Tasks whose single-task LoRA scores so low that single test rows decide Δm%, which divides by that score."""
    tasks = comparison["tasks"]
    scores = comparison["references"]["scores"] or {}
    if all(row["delta_m"] is None for row in comparison["rows"]):
        return []
    correct = {
        task: score["mean"] * tasks[task]["n"] / 100.0
        for task, score in scores.items()
        if task in tasks and score["mean"]
    }
    few = [task for task, count in correct.items() if count < _FEW_CORRECT]
    if not few:
        return []
    least = min(few, key=correct.__getitem__)
    change = 100.0 / (correct[least] * len(tasks))
    return [
        f"Δm% says little here: one more correct answer in {least} changes it by {change:.1f} points, because its "
        f"single-task LoRA scores {scores[least]['mean']:.1f}. Compare the means, or leave out {', '.join(few)}."
    ]


def _margin(value: Mapping[str, Any], confidence: float) -> float | None:
    """Half the width of Student's interval of a mean over seeds; None with one seed."""
    seeds = sum(one is not None for one in value["values"])
    if value["std_seeds"] is None:
        return None
    return t_quantile(confidence, seeds - 1) * float(value["std_seeds"]) / math.sqrt(seeds)


def _listed(tasks: Mapping[str, float]) -> str:
    return ", ".join(f"{task} ({mean:+.1f})" for task, mean in tasks.items())
