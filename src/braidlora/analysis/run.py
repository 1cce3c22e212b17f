"""`analyze`: properties of adapters on disk and, on request, of the model with the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braidlora.analysis.batches import ROWS
from braidlora.analysis.drift import measure_drift
from braidlora.analysis.factors import AdapterFile
from braidlora.analysis.similarity import compare
from braidlora.analysis.targets import Target, find_targets
from braidlora.errors import ConfigError
from braidlora.runs import federation_around, read_adapter_card


def analyze(
    targets: Sequence[str | Path],
    *,
    routers: bool = False,
    gradients: bool = False,
    membership: bool = False,
    recipe: str | Path | None = None,
    rows: int = ROWS,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare adapters, measure the drift of runs and, on request, use of routers and conflict of gradients.

    Similarity and drift only read the adapters' files. Routers and gradients load the base model and rows of the
    tasks, which only a run records: they are measured for run directories and adapters inside them. A federation's
    gradients are its clients', each at its own model; its clients have no routers.

    Args:
        targets: adapter folders, run directories, checkpoints of a run, federations.
        routers: measure which expert serves which task.
        gradients: measure whether tasks (or clients) pull the shared factor in the same direction.
        membership: measure whether a loss threshold tells training rows from others; by itself, without the comparison.
        recipe: names the rows of adapter folders, for membership.
        rows: of each task, for these three.
        overrides: `dotted.key=value` for the recipe of the runs, e.g. the path of its base model.

    Returns:
        the content of `analysis.json`, see docs/reference/analysis.md.

    Raises:
        ConfigError: nothing to compare, a target given twice, or no run although one is needed.
        CheckpointError: a target is not an adapter, is damaged, or does not fit the others.
        DataError: the tasks' rows cannot be read.
    """
    if rows < 1:
        raise ConfigError(f"--rows-per-task: got {rows}; expected at least 1.")
    found = find_targets(targets)
    named = any(target.run or (gradients and target.federation) for target in found)
    if (routers or gradients) and not named:
        raise ConfigError(
            "--routers and --gradients: each needs the tasks' rows, which an adapter folder does not record; give a "
            "run directory, or an adapter or checkpoint inside one (for --gradients also a federation)."
        )
    if recipe is not None and not membership:
        raise ConfigError(
            "--recipe names the rows of an adapter for --membership, and has no effect without it."
        )
    adapters = [target.open() for target in found]
    if membership and not (routers or gradients):
        analysis = _described(found, adapters)
        _measure_membership(analysis, found, rows, recipe, overrides)
        return analysis
    _warn_of_several_bases([adapter.folder for adapter in adapters])
    runs = {target.label: target.run for target in found if target.whole_run and target.run}
    experts = any(adapter.experts > 1 for adapter in adapters)
    # One plain LoRA cannot be compared, but a run has drift, and its tasks have gradients.
    alone = len(adapters) == 1 and not experts and (bool(runs) or gradients)
    analysis = _described(found, adapters)
    analysis["similarity"] = None if alone else compare(adapters)
    analysis["drift"] = {label: measure_drift(run) for label, run in runs.items()}
    if routers or gradients:
        _measure_models(analysis, found, routers, gradients, rows, overrides)
    if membership:
        _measure_membership(analysis, found, rows, recipe, overrides)
    return analysis


def _described(targets: Sequence[Target], adapters: Sequence[AdapterFile]) -> dict[str, Any]:
    """What every analysis says of its adapters, and no results yet."""
    return {
        "adapters": [
            {
                "label": target.label, "path": str(target.path), "type": adapter.kind, "share": adapter.scheme.share,
                "experts": adapter.experts, "layers": len(adapter.layers),
            }
            for target, adapter in zip(targets, adapters, strict=True)
        ],
        "similarity": None,
        "drift": {},
    }  # fmt: skip


def _warn_of_several_bases(folders: Sequence[Path]) -> None:
    """Warn if adapters of different bases are compared: the shapes may match, but the updates mean different things."""
    bases: dict[str, Path] = {}
    for folder in folders:
        card = read_adapter_card(folder)
        if card is not None and card.base is not None:
            bases.setdefault(card.base.fingerprint, folder)
    if len(bases) > 1:
        one, other, *_ = bases.values()
        warnings.warn(
            f"{one} and {other} were trained on different bases, so their similarity is not meaningful",
            stacklevel=3,
        )


def analyze_run(directory: str | Path, rows: int = 32) -> dict[str, Any]:
    """Similarity of a run's experts, its drift, and which expert serves which task, for a report.

    Raises:
        BraidloraError: as `analyze`.
    """
    return analyze([directory], routers=True, rows=rows)


def _measure_models(
    analysis: dict[str, Any],
    targets: Sequence[Target],
    routers: bool,
    gradients: bool,
    rows: int,
    overrides: Sequence[str],
) -> None:
    # Imported late: comparing files does not need transformers, whose import takes longer than the comparison.
    from braidlora.analysis.gradients import measure_client_gradients, measure_gradients
    from braidlora.analysis.routers import measure_routers
    from braidlora.models.loading import load_for_evaluation

    analysis |= {"routers": {}} if routers else {}
    analysis |= {"gradients": {}} if gradients else {}
    for target in targets:
        if target.run is None:
            continue
        loaded = load_for_evaluation(target.path, overrides=overrides)
        if routers:
            analysis["routers"][target.label] = measure_routers(loaded, rows)
        if gradients:
            analysis["gradients"][target.label] = measure_gradients(loaded, rows)
    federations = dict(target.federation for target in targets if target.federation)
    for label, directory in federations.items():
        if routers:
            analysis["routers"][label] = None
        if gradients:
            analysis["gradients"][label] = measure_client_gradients(directory, rows, overrides)


def _measure_membership(
    analysis: dict[str, Any],
    targets: Sequence[Target],
    rows: int,
    recipe: str | Path | None,
    overrides: Sequence[str],
) -> None:
    from braidlora.analysis.membership import check_recipe, measure_federation, measure_membership

    found = analysis["membership"] = {}
    for label, directory in dict(target.federation for target in targets if target.federation).items():
        found[label] = measure_federation(directory, rows, overrides)
    for target in targets:
        if target.federation:
            continue
        client = federation_around(target.path)
        check_recipe(recipe, target.run is None and client is None, str(target.path))
        if client is not None and recipe is None:
            folder = target.path.resolve()
            name = folder.parent.name if folder.name == "adapter" else folder.name
            found[target.label] = measure_federation(client, rows, overrides, only=name)
        else:
            found[target.label] = measure_membership(target.path, rows, recipe=recipe, overrides=overrides)
