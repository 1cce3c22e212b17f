"""The Python calls behind `braidlora.train`, `compare`, `federate`, `advise`, `analyze` and `load`.

Each takes a recipe as the command line does (a path, a built-in name, or a checked configuration) and overrides of its
keys as keyword arguments, with `__` for the dot: `train("demo", training__max_steps=10)`. A key that is not a Python
name goes into a mapping: `train("demo", **{"tasks.*.train.limit": 50})`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from braidlora.config import FederatedConfig, RunConfig, built_in_recipes, load_config, override_config
from braidlora.inference import load
from braidlora.runs import output_of

if TYPE_CHECKING:
    from braidlora.comparison import Sweep
    from braidlora.federated.simulation.driver import FederationResult
    from braidlora.one_run import RunResult

__all__ = ["advise", "analyze", "compare", "federate", "load", "train"]

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def train(
    recipe: str | Path | RunConfig,
    *,
    resume: Literal["auto"] | Path | None = None,
    allow_inexact_resume: bool = False,
    overwrite: bool = False,
    evaluate: bool = True,
    progress: bool = True,
    **overrides: Any,
) -> RunResult:
    """Fine-tune the recipe's base on its tasks, save the adapter, and score it on the test rows.

    Args:
        recipe: a path, a built-in name, or a checked configuration.
        resume: `auto`, or a checkpoint to resume from.
        allow_inexact_resume: resume even if optimizer, scheduler or RNG state is missing.
        overwrite: discard an earlier run in the directory.
        evaluate: score the test rows.
        progress: show a progress bar on stderr.
        overrides: values of the recipe's keys.

    Returns:
        `directory`, `metrics` (the content of metrics.json) and `steps`.

    Raises:
        BraidloraError: its subclasses correspond to the exit codes of the command line.
    """
    from braidlora.one_run import train

    return train(
        _config(recipe, overrides, RunConfig),
        resume=resume,
        allow_inexact_resume=allow_inexact_resume,
        overwrite=overwrite,
        evaluate=evaluate,
        progress=progress,
    )


def compare(
    recipe: str | Path | RunConfig,
    *,
    methods: Sequence[str] | None = None,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str | None = None,
    references: Literal["single-task", "none"] | None = None,
    tune: Mapping[str, Sequence[Any]] | Literal["auto"] | None = None,
    sweep: Sweep | None = None,
    workers: int | Literal["auto"] = "auto",
    overwrite: bool = False,
    report: bool = True,
    progress: bool = True,
    **overrides: Any,
) -> dict[str, Any]:
    """Train a recipe with several methods and seeds, and say which is better and whether that is significant.

    Everything is written to OUTPUT-compare, where OUTPUT is that of the recipe, unless `output` is given.

    Args:
        recipe, overrides: as of `train`.
        methods, rows, seeds, baseline, references, tune, sweep, workers, overwrite, report, progress: see
            `braidlora.comparison.compare`.

    Returns:
        the content of comparison.json.
    """
    from braidlora.comparison import compare

    config = _config(recipe, overrides, RunConfig)
    output = output_of(config.output, "compare", _dotted(overrides))
    return compare(
        config.model_copy(update={"output": output}),
        name=_name(recipe),
        methods=methods,
        rows=rows,
        seeds=seeds,
        baseline=baseline,
        references=references,
        tune=tune,
        sweep=sweep,
        workers=workers,
        overwrite=overwrite,
        report=report,
        progress=progress,
    )


def federate(
    recipe: str | Path | FederatedConfig,
    *,
    resume: Literal["auto"] | None = None,
    overwrite: bool = False,
    local_run: Path | None = None,
    progress: bool = True,
    **overrides: Any,
) -> FederationResult:
    """Train the clients of a federated recipe together, and save and score every client's model.

    Everything is written to OUTPUT-federate, where OUTPUT is that of the recipe, unless `output` is given.

    Args:
        recipe, overrides: as of `train`.
        resume, overwrite, local_run, progress: see `braidlora.federated.simulation.driver.federate`.

    Returns:
        `directory` and `metrics` (the content of metrics.json).
    """
    from braidlora.federated.simulation.driver import federate

    config = _config(recipe, overrides, FederatedConfig)
    output = output_of(config.output, "federate", _dotted(overrides))
    return federate(
        config.model_copy(update={"output": output}),
        resume=resume,
        overwrite=overwrite,
        local_run=local_run,
        progress=progress,
    )


def advise(
    recipe: str | Path | RunConfig, *, share: float = 0.05, progress: bool = True, **overrides: Any
) -> dict[str, Any]:
    """Measure which tasks are alike or in conflict, and what that predicts about sharing B, A, both or nothing.

    `advice.json` is written to OUTPUT-advise, where OUTPUT is that of the recipe, unless `output` is given.

    Args:
        recipe, overrides: as of `train`.
        share, progress: see `braidlora.advisor.advise`.

    Returns:
        the content of advice.json.
    """
    from braidlora.advisor import advise

    config = _config(recipe, overrides, RunConfig)
    output = output_of(config.output, "advise", _dotted(overrides))
    return advise(config, output, name=_name(recipe), share=share, progress=progress)


def analyze(
    targets: str | Path | Sequence[str | Path],
    *,
    routers: bool = False,
    gradients: bool = False,
    membership: bool = False,
    recipe: str | Path | None = None,
    rows: int = 64,
    **overrides: Any,
) -> dict[str, Any]:
    """Compare adapters, measure the drift of runs and, on request, use of routers and conflict of gradients.

    Args:
        targets: adapter folders, run directories, checkpoints of a run, federations.
        routers, gradients, membership, recipe, rows: see `braidlora.analysis.analyze`.
        overrides: as of `train`, for the recipe of the runs.

    Returns:
        the content of analysis.json; nothing is written.
    """
    from braidlora.analysis import analyze

    given = [targets] if isinstance(targets, str | Path) else targets
    return analyze(
        given,
        routers=routers,
        gradients=gradients,
        membership=membership,
        recipe=recipe,
        rows=rows,
        overrides=_words(_dotted(overrides)),
    )


def _name(recipe: str | Path | RunConfig) -> str:
    """A recipe's name in tables."""
    if not isinstance(recipe, str | Path):
        return "recipe"
    return str(recipe) if recipe in built_in_recipes() else Path(recipe).stem


def _config(recipe: str | Path | ConfigT, overrides: Mapping[str, Any], schema: type[ConfigT]) -> ConfigT:
    values = _dotted(overrides)
    if isinstance(recipe, str | Path):
        return load_config(recipe, _words(values), schema)
    return override_config(recipe, values) if values else recipe


def _dotted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key.replace("__", "."): str(value) if isinstance(value, Path) else value
        for key, value in overrides.items()
    }


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """`key=value` as on the command line; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
