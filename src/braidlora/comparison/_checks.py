"""Checks before a comparison writes or trains anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from braidlora.comparison._cells import Cell
from braidlora.comparison._rows import Row, check_keys
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataError
from braidlora.models.adapter_config import build_adapter_config
from braidlora.models.tokenizer import load_tokenizer
from braidlora.runs import RunDirectory, refuse_links
from braidlora.tasks import LabelSpace, Task, encode_tasks
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows
from braidlora.tasks.class_weights import class_weights

# Everything that a comparison writes; a link there would redirect the writes to another place.
_WRITTEN = (
    "recipe.yaml", "comparison.json", "comparison.md", "analysis.json", "report.html", "manifest.json", "figures",
    "cells", "base",
)  # fmt: skip


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as given; raises ConfigError if there are none, one is given twice, or one is out of range."""
    wrong = [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**32]
    if not seeds or wrong or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"--seeds: got {list(seeds)}; expected one or more different non-negative integers, e.g. --seeds 0,1,2."
        )
    return list(seeds)


def check_directory(output: str, marker: str) -> Path:
    """The comparison's folder: a new one, or one in which a comparison was started, shown by the file `marker`.

    Raises:
        ConfigError: the folder holds a training run or other files.
    """
    directory = RunDirectory.at(output)
    refuse_links(directory.path, _WRITTEN)
    if (directory.path / marker).is_file() or directory.state() == "new":
        return directory.path
    what = "files that are not from a comparison" if directory.state() == "foreign" else "a training run"
    raise ConfigError(
        f"output: {directory.path} holds {what}; nothing there was changed. Give the comparison its own folder with "
        "--output=PATH."
    )


def check_tasks(tasks: Sequence[Task], *, tuned: bool) -> None:
    """Raise DataError if no task has test rows, and ConfigError if `tuned` and no task has validation rows."""
    if not any(task.test for task in tasks):
        raise DataError(
            f"no test rows in any task ({', '.join(task.name for task in tasks)}), so nothing could be compared: give "
            "`test` in the tasks, or hold some out with --split.test=0.1."
        )
    if tuned and not any(task.validation for task in tasks):
        raise ConfigError(
            "--tune selects values by the loss on validation rows, and the recipe has none: set "
            "--split.validation=0.1, or give the tasks `validation`."
        )


def check_rows(tasks: Sequence[Task], recipe: RunConfig) -> list[str]:
    """Warn once for all cells of what is probably wrong with the rows; raises DataError as training would."""
    labels = LabelSpace.of(tasks) if recipe.kind == "classify" else None
    class_weights(recipe, tasks, labels)
    found = warn_of_rows(tasks, recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = encode_tasks(tasks, tokenizer, recipe.prompt, "train", labels)
    return found + warn_of_lengths({"train": rows}, recipe) + warn_of_prompts(tasks, tokenizer, recipe)


def check_adapters(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if PEFT would reject the configuration of a row, before hours of training."""
    for cell in cells:
        if cell.kind == "train" and not cell.is_done():
            try:
                build_adapter_config(cell.config)
            except ConfigError as error:
                raise ConfigError(f"{cell.name}: {error}") from None


def check_report() -> None:
    """Raise ConfigError if matplotlib or jinja2, which the report needs after training, is not installed."""
    missing = [package for package in ("matplotlib", "jinja2") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"the report needs {' and '.join(missing)}: pip install 'braidlora[report]', or --no-report."
        )


def check_grid(tune: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> None:
    """Raise ConfigError if a tuned key has no values or one twice, or is also set by a row or by the comparison."""
    check_keys("--tune", tune)
    for key, values in tune.items():
        if not values or len({json.dumps(value) for value in values}) < len(values):
            raise ConfigError(f"--tune {key}: got {list(values)}; expected one or more values that differ.")
        own = [row.name for row in rows if key in row.overrides]
        if own:
            raise ConfigError(
                f"--tune {key}: {', '.join(own)} sets this key itself, but every row must get the same grid; "
                "leave one out."
            )


def check_names(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if two runs would share a folder."""
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two values would share the folder {twice[0]}; compare them separately.")
