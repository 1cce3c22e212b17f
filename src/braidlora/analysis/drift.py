"""How far a run's A, B and ΔW moved since it began, from the adapters that it saved during training.

A starts at random, so it is compared with the adapter before the first step (`adapter_init`). B starts at zero, which
has no direction: B and ΔW are compared with the first checkpoint after warm-up, and so is A, for comparability.

With `training.load_best` the run's result may be from before its end; it is ordered by its step among the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidlora.analysis import subspaces
from braidlora.analysis.change import Change, matrix_change, update_change
from braidlora.analysis.factors import AdapterFile, LayerFactors, LayerName
from braidlora.analysis.similarity import common_layers, describe
from braidlora.analysis.steps import steps_of
from braidlora.analysis.subspaces import column_space
from braidlora.config import load_config
from braidlora.runs import RunDirectory

INIT, FINAL = "adapter_init", "adapter"
FACTORS = ("A", "B", "delta")
QUANTITIES = ("magnitude", "direction", "similarity", "chance", "norm_before", "norm_after")
_ZERO = "B is zero in {}, and zero has no direction"


def measure_drift(run: RunDirectory) -> dict[str, Any]:
    """The `drift` section of one run, see docs/reference/analysis.md.

    Raises:
        CheckpointError: a saved adapter or the log is damaged.
    """
    config = load_config(run.config, content=run.read(run.config.name))
    warmup, ends = config.training.warmup_steps, steps_of(run, config)
    saved = {run.adapter_init: 0, **{run.checkpoint(step): step for step in run.checkpoint_steps()}}
    saved[run.adapter] = ends.adapter
    folders = sorted((folder for folder in saved if folder.is_dir()), key=saved.__getitem__)
    steps = {folder.name: saved[folder] for folder in folders}
    # Nothing can be measured from the last of them, which is the end itself.
    end = max(steps.values(), default=0)
    after_warmup = next((step for step in run.checkpoint_steps() if max(warmup, 1) <= step < end), None)
    adapters = {folder.name: AdapterFile(folder, folder.name) for folder in folders}
    changes, reasons = [], {}
    for reference, reason in (
        (INIT, f"{run.adapter_init} was not saved."),
        (None if after_warmup is None else f"step-{after_warmup}", _no_reference(run.checkpoints, warmup)),
    ):
        if reference not in adapters:
            reasons["since_start" if reference == INIT else "since_warmup"] = reason
            continue
        later = [stage for stage, step in steps.items() if step > steps[reference]]
        changes += [change_between(adapters[reference], adapters[stage]) for stage in later]
    return {
        "warmup_steps": warmup,
        "stages": list(adapters),
        "steps": list(steps.values()),
        "last_step": ends.last,
        "since_start": INIT if INIT in adapters else None,
        "since_warmup": None if after_warmup is None else f"step-{after_warmup}",
        **({"reasons": reasons} if reasons else {}),
        "changes": changes,
    }


def find_change(drift: dict[str, Any], reference: str | None, stage: str = FINAL) -> dict[str, Any] | None:
    """The change from `reference` to `stage` in a drift section, if it is there."""
    return next((one for one in drift["changes"] if (one["from"], one["to"]) == (reference, stage)), None)


def mean_change(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every quantity's mean over the changes that have it; a quantity that none has is None, with the first reason."""
    mean: dict[str, Any] = {}
    for quantity in QUANTITIES:
        values = [entry[quantity] for entry in changes if entry[quantity] is not None]
        mean[quantity] = sum(values) / len(values) if values else None
    reasons = [entry["reason"] for entry in changes if "reason" in entry]
    if reasons and len(reasons) == len(changes):
        mean["reason"] = reasons[0]
    return mean


def _no_reference(checkpoints: Path, warmup: int) -> str:
    return (
        f"no checkpoint was saved between the end of warm-up (step {warmup}) and the end of the run in {checkpoints}; "
        "train with training.save_steps at the end of warm-up or soon after"
    )


def change_between(before: AdapterFile, after: AdapterFile) -> dict[str, Any]:
    """One entry of `changes`: from one adapter to a later one of the same run."""
    layers = [_layer(name, before, after) for name in common_layers([before, after])]
    return {
        "from": before.label,
        "to": after.label,
        "mean": {
            factor: mean_change([entry for layer in layers for entry in layer[factor]]) for factor in FACTORS
        },
        "layers": layers,
    }


def _layer(name: LayerName, before: AdapterFile, after: AdapterFile) -> dict[str, Any]:
    X, Y = before.read(name.name), after.read(name.name)
    zero = _ZERO.format(before.label)
    return {
        **describe(name),
        # A's subspace is spanned by its rows, but the change is measured by column, as in DoRA.
        "A": [
            _entry(matrix_change(A0, A1), _similarity(A0.T, A1.T, X.rank), zero)
            for A0, A1 in zip(X.A, Y.A, strict=True)
        ],
        "B": [
            _entry(matrix_change(B0, B1), _similarity(B0, B1, X.rank), zero)
            for B0, B1 in zip(X.B, Y.B, strict=True)
        ],
        "delta": _updates(X, Y, zero),
    }


def _updates(X: LayerFactors, Y: LayerFactors, zero: str) -> list[dict[str, Any]]:
    """ΔW of every expert."""
    if X.scaling is None:
        missing = dict.fromkeys(QUANTITIES)
        return [{**missing, "reason": "DoRA's update depends on the base weight too"} for _ in X.updates]
    return [
        _entry(update_change(before, after, X.scaling), (None, None), zero)
        for before, after in zip(X.updates, Y.updates, strict=True)
    ]


def _similarity(X_nr: Tensor, Y_nr: Tensor, rank: int) -> tuple[float | None, float | None]:
    """Similarity of two column spaces and its chance level; None if one of them is not of that rank."""
    X, Y = column_space(X_nr, rank), column_space(Y_nr, rank)
    if X.basis is None or Y.basis is None:
        return None, None
    same = torch.equal(X_nr, Y_nr)
    return (1.0 if same else subspaces.similarity(X, Y)), subspaces.chance(X, Y)


def _entry(change: Change, similarity: tuple[float | None, float | None], zero: str) -> dict[str, Any]:
    entry = {**dataclasses.asdict(change), "similarity": similarity[0], "chance": similarity[1]}
    if change.direction is None:
        entry["reason"] = zero
    return {key: entry[key] for key in (*QUANTITIES, *(["reason"] if "reason" in entry else []))}
