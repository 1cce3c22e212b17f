"""Where an export finds its recipe and its base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braidlora.config import FederatedConfig, ModelSection, RunConfig, load_config
from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.evaluation.loading import Loaded, load_for_evaluation, refuse_another_base
from braidlora.export.source import Source
from braidlora.runs import FederatedDirectory, RunDirectory
from braidlora.tasks import LabelSpace, load_tasks
from braidlora.training.base import base_fingerprint, load_base


def recipe_for(
    source: Source,
    recipe: str | Path | None,
    weights_from: str | Path | None,
    overrides: Sequence[str],
    base: str | None,
) -> RunConfig | None:
    """The recipe at hand: the one given, the run's or federation's own, or that of the run whose rows are read.

    Raises:
        ConfigError: there is none, and overrides were given; `weights_from` is no run.
    """
    if recipe is not None:
        config = load_config(recipe, overrides)
    elif source.run is not None:
        config = load_config(source.run.config, overrides, content=source.run.read(source.run.config.name))
    elif source.federation is not None:
        content = source.federation.read(source.federation.config.name)
        config = load_config(source.federation.config, overrides, FederatedConfig, content=content)
    elif weights_from is not None:
        config = load_run(weights_from, overrides)
    elif overrides:
        raise ConfigError(
            f"--{overrides[0]}: this adapter belongs to no run, so there is no recipe to override; give --recipe "
            "RECIPE, or --base PATH for another base."
        )
    else:
        return None
    if base is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": base})})


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe of the run that `--weights-from` names."""
    run = RunDirectory(Path(folder).expanduser())
    if not run.config.is_file():
        raise ConfigError(f"--weights-from: {folder} is no run directory (it has no {run.config.name}).")
    return load_config(run.config, overrides, content=run.read(run.config.name))


def load_with_tasks(source: Source, config: RunConfig | None) -> Loaded:
    """Base, adapter and tasks, to measure on.

    Raises:
        ConfigError: no recipe is at hand.
        DataError: the tasks' rows cannot be read.
    """
    if config is None:
        raise ConfigError(
            "--static-weights=task=NAME: the adapter belongs to no run, so its tasks are unknown; give --weights-from "
            "RUN, or --recipe RECIPE."
        )
    try:
        return load_for_evaluation(source.folder, config)
    except DataError as error:
        raise DataError(
            f"{error} The rows are needed to measure; --static-weights=uniform (or numbers) with --no-scores reads "
            "none."
        ) from error


def refuse_quantised(config: RunConfig | None) -> None:
    """Raise unless the base has full weights to merge into."""
    if config is not None and config.model.quantization != "none":
        raise ConfigError(
            f"--merge: the base is quantised ({config.model.quantization}), and a sum with its weights would be "
            "rounded to them. Merge into full weights with --model.quantization=none; the adapter was trained against "
            "rounded ones, so evaluate the result."
        )


def load_base_alone(source: Source, config: RunConfig | None, base: str | None) -> tuple[Any, Any]:
    """The base model and its tokenizer. The tasks' rows are read for the labels of a classifier without a run only.

    Raises:
        ConfigError: it is not known which base, or what kind of model.
    """
    if config is None:
        path = base or source.config.base_model_name_or_path
        if source.config.task_type != "CAUSAL_LM" or not path:
            raise ConfigError(
                "--merge: the adapter does not say what kind of base it belongs to (a causal language model and its "
                "path); give --recipe RECIPE."
            )
        return load_base(ModelSection(path=path), "generate")
    label_space = None
    if config.kind == "classify":
        where = source.run or source.federation
        known = where is not None and where.labels.is_file()
        label_space = (
            LabelSpace.parse(where.labels, where.read(where.labels.name))
            if where and known
            else LabelSpace.of(load_tasks(config))
        )
    network, tokenizer = load_base(config.model, config.kind, label_space)
    if source.run is not None:
        refuse_another_base(source.run, config, network)
    elif source.federation is not None:
        _refuse_another_base(source.federation, config, network)
    return network, tokenizer


def _refuse_another_base(federation: FederatedDirectory, config: RunConfig, base: Any) -> None:
    content = federation.read(federation.config.name)
    own = load_config(federation.config, [], FederatedConfig, content=content).model
    if own.model_copy(update={"path": config.model.path}) != config.model:
        return  # another dtype has another fingerprint, and is allowed
    trained_on, found = federation.read_json(federation.experiment.name)["base"], base_fingerprint(base)
    if trained_on != found:
        raise CheckpointError(
            f"{federation.path}: trained on another base, with fingerprint {trained_on}; {config.model.path} has "
            f"{found}. Give the base it was trained on with --base PATH."
        )
