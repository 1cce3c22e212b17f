"""From measurements to three sentences: what to share, how sure that is, what to do next. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.adapters.sharing import by_method
from braidlora.advisor.calibration import SHARES, Rule, wilson
from braidlora.advisor.pairs import AGAINST, MEASURES, against
from braidlora.tables import listed, number, plural

_NAMED = 3  # pairs


def advice(
    name: str,
    measures: Mapping[str, float | None],
    gradients: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """The `advice` of `advice.json`.

    Args:
        name: of the recipe.
        measures: of the probe.
        gradients: the `factors` of `measure_gradients`.
        pairs: of `pairs_of`.
        calibration: see `read_calibration`; its `rule` is null where no measurement predicts.

    Returns:
        `share` and `method` (both None without a rule that predicts), and the sentences `what`, `conflicts`, `sure`
        and `next`.
    """
    rule = None if calibration["rule"] is None else Rule(**calibration["rule"])
    if rule is not None and measures[rule.measure or ""] is None:
        rule = None
    method = None if rule is None else rule.pick(measures)
    return {
        "share": None if method is None else SHARES[method],
        "method": method,
        "what": _nothing(calibration) if rule is None else _pick(rule, measures),
        "conflicts": conflicts(pairs, gradients),
        "sure": _sure(calibration),
        "next": _next(name, method),
    }


def _pick(rule: Rule, measures: Mapping[str, float | None]) -> str:
    method = rule.pick(measures)
    value = measures[rule.measure or ""]
    side = "below" if method == rule.below and value is not None and value < rule.threshold else "at least"
    return (
        f"Share {SHARES[method]} ({label(method)}): {MEASURES[rule.measure or '']} is {number(value, 2)}, {side} "
        f"{number(rule.threshold, 2)}."
    )


def _nothing(calibration: Mapping[str, Any]) -> str:
    return (
        "No advice on what to share: these measurements describe the tasks, but on "
        f"{plural(calibration['suites'], 'suite')} with a known outcome none of them predicted the best method of a "
        "suite it had not seen."
    )


def _sure(calibration: Mapping[str, Any]) -> str:
    best, same, lora = (calibration[key] for key in ("best_measure", "always", "lora"))
    low, high = wilson(best["good"], best["of"])
    return (
        "Good picks (not significantly worse than the best) on suites of another family: "
        f"{_of(best)} by {MEASURES[best['measure']]} (95% CI {low:.0%} to {high:.0%}), {_of(same)} without measuring, "
        f"by taking the method that was best elsewhere (mostly {label(same['method'])}), {_of(lora)} by always taking "
        f"{label('lora')}, {calibration['random']:.0%} at random."
    )


def _of(picks: Mapping[str, Any]) -> str:
    return f"{picks['good']} of {picks['of']}"


def _next(name: str, method: str | None) -> str:
    if method is None or method == "lora":
        return (
            f"`braidlora compare {name}` decides; until then LoRA is the cheapest, and merges into the base."
        )
    return f"`braidlora compare {name} --methods lora,{method}` says whether it is worth its parameters."


def conflicts(pairs: Sequence[Mapping[str, Any]], gradients: Mapping[str, Any]) -> str:
    """Which tasks pull against each other, and how far the rows of one task agree."""
    found = against(pairs)
    agree = listed(
        [
            f"{number(gradients[factor]['within'], 2)} on {factor}"
            for factor in ("A", "B")
            if gradients[factor]["within"] is not None
        ]
    )
    within = f" (two halves of one task's rows have a cosine of {agree})" if agree else ""
    if not found:
        return f"No two tasks pull against each other in all halves of their rows{within}."
    named = [f"{listed(pair['tasks'])} ({_cosines(pair)})" for pair in found[:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"{len(found)} of {plural(len(pairs), 'pair')} of tasks pull against each other, in all halves of their rows: "
        f"{'; '.join(named)}{more}{within}."
    )


def _cosines(pair: Mapping[str, Any]) -> str:
    """Of the factors on which the two pull against each other."""
    return ", ".join(
        f"{factor} {number(pair[factor]['cosine'], 2, sign=True)}"
        for factor in ("A", "B")
        if pair[factor]["pull"] == AGAINST
    )


def label(method: str) -> str:
    """As tables call the method of a comparison."""
    return "LoRA, matched" if method == "lora-matched" else by_method()[method].label
