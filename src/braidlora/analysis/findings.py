"""What a study shows, in words and numbers: whether the paper's two findings hold for this model and these tasks.

A similarity s is rescaled by chance c to (s − c) / (1 − c): 0 is the level of random subspaces, 1 the same subspace.
The thresholds are ours; the paper shows curves.

1. "A matrices are similar only if they share a seed" holds if pairs with the same seed are at 0.5 or more, and pairs
   with different seeds, of the same task or not, at 0.1 or less.
2. "A hardly changes direction; B does" holds if A's direction changes by 0.1 or less since the start, and
   B's at least twice as much as A's since the same checkpoint.

A finding holds in part if the seed still raises the similarity by 0.1, or if one half of the second is met.
"""

from __future__ import annotations

from typing import Any

from braidlora.analysis.study_sums import BOTH_DIFFER, SAME_SEED, SAME_TASK

SIMILAR, BY_CHANCE, LIFT = 0.5, 0.1, 0.1
STILL, TIMES = 0.1, 2.0
HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "holds in part", "does not hold", "unknown"


def findings(study: dict[str, Any]) -> dict[str, Any]:
    """`alike_by_seed` and `b_takes_the_direction`, each with `finding` (holds, …) and `text`."""
    return {"alike_by_seed": _similarity(study), "b_takes_the_direction": _direction(study["drift"])}


def _similarity(study: dict[str, Any]) -> dict[str, str]:
    A, start = study["end"]["A"], study["start"]["A"]
    groups = A["groups"]
    if A["chance"] is None or A["chance"] >= 1.0 or any(found is None for found in groups.values()):
        return {
            "finding": UNKNOWN,
            "text": "Whether A matrices are similar only if they share a seed is unknown: the rank equals the width of "
            "the layers, so that all subspaces are the same, or an A is rank-deficient. Try a smaller adapter.r.",
        }
    above = {group: (found["mean"] - A["chance"]) / (1.0 - A["chance"]) for group, found in groups.items()}
    by_seed, otherwise = above[SAME_SEED], max(above[SAME_TASK], above[BOTH_DIFFER])
    if by_seed >= SIMILAR and otherwise <= BY_CHANCE:
        finding, words = HOLDS, "they are similar only because they start from the same values"
    elif by_seed - otherwise >= LIFT and by_seed >= SIMILAR:
        finding = PARTLY
        words = "a common start makes them similar, but A matrices from different seeds are also closer than chance"
    elif by_seed - otherwise >= LIFT:
        finding = PARTLY
        words = "a common start has an effect, but training has moved A far from it"
    else:
        finding, words = FAILS, "a common start makes little difference to their final similarity"
    text = (
        f"A matrices are similar only if they share a seed: {finding}. Similarity of A between different tasks: "
        f"{_text(groups[SAME_SEED])} with the same seed, {_text(groups[BOTH_DIFFER])} with different seeds; within one "
        f"task, with different seeds: {_text(groups[SAME_TASK])}; chance: {A['chance']:.3f}; before training, with the "
        f"same seed: {start['groups'][SAME_SEED]['mean']:.3f}. In short: {words}. "
        + _column_spaces(study["end"]["B"])
    )
    return {"finding": finding, "text": text}


def _column_spaces(B: dict[str, Any]) -> str:
    groups = B["groups"]
    if any(groups[group] is None for group in groups):
        return "B has no subspace of full rank to compare."
    return (
        f"Similarity of B between different tasks: {_text(groups[SAME_SEED])} with the same seed, "
        f"{_text(groups[BOTH_DIFFER])} with different seeds; within one task, with different seeds: "
        f"{_text(groups[SAME_TASK])}; chance: {B['chance']:.3f}."
    )


def _direction(drift: dict[str, Any]) -> dict[str, str]:
    start, warmup = drift["since_start"], drift["since_warmup"]
    if start is None or warmup is None:
        missing = "; ".join(drift["reasons"].values())
        return {"finding": UNKNOWN, "text": f"How far A and B changed direction is unknown: {missing}."}
    since_start = start["A"]["direction"]
    turned = [warmup[factor]["direction"] for factor in ("A", "B", "delta")]
    if None in turned:
        return {
            "finding": UNKNOWN,
            "text": f"How far B changed direction is unknown: it was still zero in {warmup['from']}.",
        }
    A, B = turned[0]["mean"], turned[1]["mean"]
    still, takes = since_start["mean"] <= STILL, B >= TIMES * A
    finding = HOLDS if still and takes else PARTLY if still or takes else FAILS
    moves = "A hardly changes direction" if still else "A changes direction noticeably"
    compared = f"B changes {B / A:.1f} times as much" if A else "only B changes"
    text = (
        f"A hardly changes direction; B does: {finding}. Change of direction (1 − cosine, by columns) of "
        f"A since the start is {_text(since_start)}; since {warmup['from']}, A {_text(turned[0])}, B "
        f"{_text(turned[1])}, ΔW {_text(turned[2])}. In short: {moves}, and after the same checkpoint {compared}."
    )
    return {"finding": finding, "text": text}


def _text(found: dict[str, Any]) -> str:
    """Mean and spread over pairs or runs."""
    return f"{found['mean']:.3f} ± {found['std']:.3f}"
