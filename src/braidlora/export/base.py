"""The recipe and the base model of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braidlora.config import ModelSection, RunConfig, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.export.source import Source
from braidlora.models.base import load_base
from braidlora.models.loading import Loaded, load_for_evaluation
from braidlora.models.origin import recipe_of
from braidlora.models.presence import refuse_missing_base
from braidlora.paths import expanded
from braidlora.runs import RunDirectory
from braidlora.tasks import LabelSpace, load_tasks


def recipe_for(
    source: Source,
    recipe: str | Path | None,
    weights_from: str | Path | None,
    overrides: Sequence[str],
    base: str | None,
) -> RunConfig | None:
    """The recipe: the given one, the run's or federation's own, or that of `weights_from`.

    Raises:
        ConfigError: there is none, but overrides were given; `weights_from` is not a run.
    """
    if recipe is not None:
        config = load_config(recipe, overrides)
    elif source.origin.place is not None:
        config = recipe_of(source.origin.place, overrides)
    elif weights_from is not None:
        config = load_run(weights_from, overrides)
    elif overrides:
        raise ConfigError(
            f"--{overrides[0]}: this adapter is not in a run, so it has no recipe to override; give --recipe "
            "RECIPE, or --base PATH for another base."
        )
    else:
        return None
    if base is None:
        return config
    return config.model_copy(
        update={"model": config.model.model_copy(update={"path": base, "gguf_file": None})}
    )


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe of the run that `--weights-from` names."""
    run = RunDirectory(expanded(folder))
    if not run.config.is_file():
        raise ConfigError(f"--weights-from: {folder} is not a run directory (it has no {run.config.name}).")
    return recipe_of(run, overrides)


def load_with_tasks(source: Source, config: RunConfig | None) -> Loaded:
    """Base, adapter and tasks, to measure on.

    Raises:
        ConfigError: the recipe is unknown.
        DataError: the tasks' rows cannot be read.
    """
    if config is None:
        raise ConfigError(
            "--static-weights=task=NAME: the adapter is not in a run, so its tasks are unknown; give --weights-from "
            "RUN, or --recipe RECIPE."
        )
    try:
        return load_for_evaluation(source.folder, config)
    except DataError as error:
        raise DataError(
            f"{error} The rows are needed for measuring; --static-weights=uniform (or numbers) with --no-scores "
            "does not need them."
        ) from error


def refuse_quantized(config: RunConfig | None) -> None:
    """Raise unless the base has full weights to merge into."""
    if config is not None and config.model.quantization != "none":
        raise ConfigError(
            f"--merge: the base is quantized ({config.model.quantization}), so the merged weights would be "
            "rounded. Merge into full weights with --model.quantization=none; the adapter was trained on rounded "
            "weights, so evaluate the result."
        )


def load_base_alone(source: Source, config: RunConfig | None, base: str | None) -> tuple[Any, Any]:
    """The base model and its tokenizer. The tasks' rows are only read for the labels of a classifier outside a run.

    Raises:
        ConfigError: the base or the kind of model is unknown.
    """
    if config is None:
        section, labels = _recorded_base(source, base)
    else:
        section, labels = config.model, None
        if config.kind == "classify":
            known = source.origin.known_labels(config)
            labels = known or source.origin.label_space(config, load_tasks(config))
    if base is None:
        refuse_missing_base(source.files.directory, section.path, "--base PATH")
    network, tokenizer = load_base(section, labels)
    source.origin.check_base(network, section)
    return network, tokenizer


def _recorded_base(source: Source, base: str | None) -> tuple[ModelSection, LabelSpace | None]:
    """The base recorded in the adapter's card or PEFT's configuration, and a classifier's labels."""
    card, task_type = source.origin.card, source.config.task_type
    recorded = card.base if card is not None else None
    labels = LabelSpace.from_card(card) if card is not None else None
    path = base or (recorded.path if recorded else source.config.base_model_name_or_path)
    if not path or not (task_type == "CAUSAL_LM" or (task_type == "SEQ_CLS" and labels)):
        raise ConfigError(
            "--merge: the adapter does not record its base (its path, and a classifier's labels); give --recipe "
            "RECIPE."
        )
    section = ModelSection(path=path, revision=recorded.revision if recorded and not base else None)
    return section, labels if task_type == "SEQ_CLS" else None
