"""What a comparison says, in plain sentences: who is best, whether that can be told, who loses, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.comparison.statistics import t_quantile

_MANY = 10  # intervals of single tasks from which chance is worth a word
_SEVERAL = 3  # methods against one baseline from which it is, too


def verdict(comparison: Mapping[str, Any]) -> list[str]:
    """Sentences about a comparison; they claim a difference only where its interval leaves out 0."""
    rows = comparison["rows"]
    base = next((row for row in rows if row["name"] == comparison["baseline"]), None)
    sentences = [_best(rows, base)]
    for row in rows:
        if row["difference"] is not None and base is not None:
            sentences.append(_against(row, base, comparison["confidence"]))
        elif row is not base:
            sentences.append(
                f"{row['label']} cannot be set against the baseline: {row['difference_reason']}."
            )
    sentences += _collapses(rows)
    sentences += _several(rows, base, comparison["confidence"])
    sentences += _one_by_one(rows, comparison["confidence"])
    sentences += _cost(rows, base)
    sentences += _balance(rows, comparison["confidence"])
    sentences += _seeds(len(comparison["seeds"]))
    sentences += [f"{failed['run']} failed: {failed['reason']}" for failed in comparison["failed"]]
    return sentences


def _best(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> str:
    best = max(rows, key=lambda row: row["mean"]["mean"])
    seeds, worst = len(best["seeds"]), best["worst"]
    has = "has the highest mean score," if len(rows) > 1 else "scores"
    text = f"{best['label']} {has} {score(best['mean'])} over {seeds} {'seed' if seeds == 1 else 'seeds'}"
    if len(best["tasks"]) > 1:
        text += f", and {score(worst)} on its worst task ({', '.join(dict.fromkeys(worst['tasks']))})"
    if best is base:
        compared = [row for row in rows if row["difference"] is not None]
        alike = [row["label"] for row in compared if _holds_zero(row["difference"])]
        if not compared:
            return text + "."
        if not alike:
            others = [row["label"] for row in compared]
            every = len(others) == len(rows) - 1
            return text + f"; it is better than {'every other method' if every else ', '.join(others)}."
        if len(alike) == len(compared) > 1:
            return text + "; but no difference to any other method is seen."
        return text + f"; but no difference to {' or '.join(alike)} is seen."
    if base is None or best["difference"] is None:
        return text + "."
    if _holds_zero(best["difference"]):
        return text + f"; but no difference to {base['label']} is seen."
    return text + f"; it is better than {base['label']}."


def _against(row: Mapping[str, Any], base: Mapping[str, Any], confidence: float) -> str:
    difference = row["difference"]
    shown = (
        f"{difference['mean']:+.1f} points, {confidence:.0%} interval {difference['low']:+.1f} to "
        f"{difference['high']:+.1f}"
    )
    if not difference.get("judged", True):
        return f"{row['label']} against {base['label']}: not judged, because a run collapsed ({shown})."
    if _holds_zero(difference):
        text = f"{row['label']} against {base['label']}: no difference seen ({shown})"
    else:
        word = "better" if difference["mean"] > 0 else "worse"
        text = f"{row['label']} is {word} than {base['label']} ({shown})"
    gains, loses = _tasks_seen(difference)
    if gains:
        text += f"; it gains on {_listed(gains)}"
    if loses:
        text += f"{' and' if gains else '; it'} loses on {_listed(loses)}"
    return text + "."


def _tasks_seen(difference: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Tasks with a difference whose interval leaves out 0: those that gain and those that lose."""
    tasks = difference["tasks"].items() if difference.get("judged", True) else ()
    gains = {task: one["mean"] for task, one in tasks if one["low"] > 0}
    loses = {task: one["mean"] for task, one in tasks if one["high"] < 0}
    return gains, loses


def _collapses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sentences = []
    for row in rows:
        fallen = row.get("collapsed") or []
        if fallen:
            scores = dict(zip(row["seeds"], row["mean"]["values"], strict=True))
            rest = [value for seed, value in scores.items() if seed not in fallen]
            runs = ", ".join(f"seed {seed} with {scores[seed]:.1f}" for seed in fallen)
            sentences.append(
                f"{row['label']} collapsed: {runs}, its other seeds {min(rest):.1f} to {max(rest):.1f}. An interval "
                "cannot describe runs that fall into two groups. Look at that run's loss (a lower learning rate or "
                "a longer warm-up often helps), then compare again, or run more seeds to see how often it happens."
            )
    return sentences


def _several(
    rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, confidence: float
) -> list[str]:
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    if base is None or len(compared) < _SEVERAL or all(map(_holds_zero, compared)):
        return []
    return [
        f"Every interval speaks for itself: were no method different, one of {len(compared)} would still leave out 0 "
        f"in up to {1 - confidence ** len(compared):.0%} of such comparisons."
    ]


def _one_by_one(rows: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    compared = [row["difference"] for row in rows if row["difference"] is not None]
    looked_at = sum(len(difference["tasks"]) for difference in compared)
    if not any(any(_tasks_seen(difference)) for difference in compared) or looked_at < _MANY:
        return []
    expected = (1 - confidence) * looked_at
    return [
        f"Tasks are looked at one by one: of {looked_at} such intervals about {expected:.0f} would leave out 0 by "
        "chance if no method differed."
    ]


def _cost(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[str]:
    others = [row for row in rows if row is not base]
    if base is None or not others:
        return []
    times = "; ".join(
        f"{row['label']} {row['trainable_parameters'] / base['trainable_parameters']:.2f} and "
        f"{row['seconds']['mean'] / base['seconds']['mean']:.2f}"
        for row in others
    )
    return [
        f"Cost as multiples of {base['label']}'s trainable parameters ({base['trainable_parameters']:,}) and seconds "
        f"a run ({base['seconds']['mean']:.0f}): {times}."
    ]


def _balance(rows: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    known = [row for row in rows if row["delta_m"] is not None]
    reasons = dict.fromkeys(row["delta_m_reason"] for row in rows if row["delta_m"] is None)
    sentences = [f"Δm% is not given: {reason}." for reason in reasons] if not known else []
    if known:
        best = min(known, key=lambda row: row["delta_m"]["mean"])
        word = "behind" if best["delta_m"]["mean"] > 0 else "ahead of"
        text = (
            f"Against single-task LoRAs {best['label']} stands best: Δm% {signed(best['delta_m'])}, on average {word} "
            "models that were trained on one task each"
        )
        reach = _reach(best["delta_m"], confidence)
        if reach is not None and abs(best["delta_m"]["mean"]) <= reach:
            text += (
                f"; but seeds differ by so much that it may as well be 0 (± {reach:.1f} at {confidence:.0%})"
            )
        sentences.append(text + ".")
    return sentences


def _reach(value: Mapping[str, Any], confidence: float) -> float | None:
    """Half the width of Student's interval of a mean over seeds; None with one seed."""
    seeds = sum(one is not None for one in value["values"])
    if value["std_seeds"] is None:
        return None
    return t_quantile(confidence, seeds - 1) * float(value["std_seeds"]) / math.sqrt(seeds)


def _seeds(seeds: int) -> list[str]:
    if seeds == 1:
        return [
            "One seed only: the intervals hold the luck of the test rows, not that of training, and another seed may "
            "turn the order round. Give at least three (--seeds 0,1,2)."
        ]
    if seeds == 2:
        return [
            "Two seeds say little about how much seeds differ, so the intervals are wide; give three or more."
        ]
    return []


def _holds_zero(value: Mapping[str, Any]) -> bool:
    """Whether no difference may be claimed: the interval holds 0, or a run of either method collapsed."""
    return bool(value["low"] <= 0.0 <= value["high"]) or not value.get("judged", True)


def _listed(tasks: Mapping[str, float]) -> str:
    return ", ".join(f"{task} ({mean:+.1f})" for task, mean in tasks.items())


def score(value: Mapping[str, Any]) -> str:
    """`62.3 ± 0.8`: mean and standard deviation over seeds."""
    if value["mean"] is None:
        return "–"
    spread = "" if value["std_seeds"] is None else f" ± {value['std_seeds']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def signed(value: Mapping[str, Any]) -> str:
    """`+1.2 ± 0.4`, as `score` with the sign always shown."""
    spread = "" if value["std_seeds"] is None else f" ± {value['std_seeds']:.1f}"
    return f"{value['mean']:+.1f}{spread}"
