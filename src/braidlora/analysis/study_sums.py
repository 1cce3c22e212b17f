"""A study's runs summarized: similarity by what a pair has in common, and drift, each as mean and spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from braidlora.analysis.drift import FACTORS, find_change, mean_change
from braidlora.analysis.factors import AdapterFile
from braidlora.analysis.similarity import Matrix, compare

SAME_SEED = "different_tasks_same_seed"
SAME_TASK = "same_task_different_seeds"
BOTH_DIFFER = "different_tasks_different_seeds"
GROUPS = (SAME_SEED, SAME_TASK, BOTH_DIFFER)
_QUANTITIES = ("magnitude", "direction", "similarity", "chance")


def similarity_by_group(
    adapters: Sequence[AdapterFile], pairing: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """Similarity of A and of B between all runs, by group of pairs, over all layers and for every layer.

    Args:
        adapters: one per run.
        pairing: task and seed of each.

    Returns:
        for "A" and "B" the groups (`mean` and `std` over the pairs, null if B is zero), the chance level, the matrix
        between the runs, and the same for every layer.
    """
    groups: dict[str, list[tuple[int, int]]] = {group: [] for group in GROUPS}
    for i, j in itertools.combinations(range(len(pairing)), 2):
        groups[_group(pairing[i], pairing[j])].append((i, j))
    compared = compare(adapters, with_angles=False)
    section = {}
    for factor in ("A", "B"):
        found = compared[factor]
        section[factor] = {
            "elements": found["elements"],
            "mean": found["mean"],
            "chance": found["pairs"]["chance"],
            "groups": _by_group(found["mean"], groups),
            "layers": [
                {
                    **{key: layer[key] for key in ("name", "layer", "module")},
                    "chance": layer["chance"][0][1],
                    "groups": _by_group(layer["similarity"], groups),
                }
                for layer in found["layers"]
            ],
        }
    return section


def drift_over_runs(drifts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Change by the end, mean and spread over the runs: of A since the start, of A, B and ΔW since warm-up."""
    section: dict[str, Any] = {}
    for reference in ("since_start", "since_warmup"):
        changes = [find_change(drift, drift[reference]) for drift in drifts]
        present = [change for change in changes if change is not None]
        if not present:
            section[reference] = None
            section.setdefault("reasons", {})[reference] = drifts[0]["reasons"][reference]
            continue
        section[reference] = {
            "from": present[0]["from"],
            **{factor: _spread([change["mean"][factor] for change in present]) for factor in FACTORS},
            "layers": [
                {
                    **{key: layers[0][key] for key in ("name", "layer", "module")},
                    **{
                        factor: _spread([mean_change(layer[factor]) for layer in layers])
                        for factor in FACTORS
                    },
                }
                for layers in zip(*(change["layers"] for change in present), strict=True)
            ],
        }
    return section


def _group(one: tuple[str, int], other: tuple[str, int]) -> str:
    if one[0] == other[0]:
        return SAME_TASK
    return SAME_SEED if one[1] == other[1] else BOTH_DIFFER


def _by_group(matrix: Matrix, groups: dict[str, list[tuple[int, int]]]) -> dict[str, Any]:
    return {group: _mean_std([matrix[i][j] for i, j in pairs]) for group, pairs in groups.items()}


def _spread(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {quantity: _mean_std([change[quantity] for change in changes]) for quantity in _QUANTITIES}


def _mean_std(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation (0 for one value) and number of the known values."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    std = statistics.stdev(present) if len(present) > 1 else 0.0
    return {"mean": statistics.fmean(present), "std": std, "n": len(present)}
