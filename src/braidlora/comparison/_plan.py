"""The recipe of every cell of a comparison."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braidlora.comparison._cells import Cell, base_origin
from braidlora.comparison._rows import SINGLE, Row, ignores, value_name
from braidlora.comparison._tuning import Trial
from braidlora.config import ModelSection, RunConfig, override_config
from braidlora.errors import ConfigError
from braidlora.tasks import Task, fingerprints, load_tasks


class Data:
    """The rows and bases of recipes, read once for all recipes that share them."""

    def __init__(self) -> None:
        self._tasks: dict[str, list[Task]] = {}
        self._fingerprints: dict[str, dict[str, Any]] = {}
        self._bases: dict[ModelSection, dict[str, Any]] = {}

    def tasks(self, recipe: RunConfig) -> list[Task]:
        key = _rows_key(recipe)
        if key not in self._tasks:
            self._tasks[key] = load_tasks(recipe)
        return self._tasks[key]

    def made_from(self, recipe: RunConfig, task: str | None = None) -> dict[str, Any]:
        """The origin of a run of the recipe, or of one of its tasks: sha256 of its rows, and its base."""
        key, model = _rows_key(recipe), recipe.model
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprints(self.tasks(recipe))
        if model not in self._bases:
            self._bases[model] = base_origin(model)
        rows = self._fingerprints[key]
        return {"data": rows if task is None else {task: rows[task]}, **self._bases[model]}


_LONGEST_FOLDER = 200  # file systems allow 255 bytes


@dataclass(frozen=True)
class Plan:
    """Makes the cells of a comparison.

    Args:
        recipe: what the rows change; it sets the threads of a run.
        directory: of the comparison.
        seeds: of every row.
        tune: values to try by dotted key.
    """

    recipe: RunConfig
    directory: Path
    seeds: Sequence[int]
    tune: Mapping[str, Sequence[Any]]
    data: Data = field(default_factory=Data)

    def grid(self, row: Row) -> list[dict[str, Any]]:
        """The combinations of the values to try for a row.

        A row without experts is the same for all values of a key about experts, so it is tried with the recipe's alone.
        """
        own = {key: values for key, values in self.tune.items() if not ignores(row.config(self.recipe), key)}
        return [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]

    def trial(self, row: Row, values: dict[str, Any]) -> Trial:
        """The runs of `row` with `values` of the grid."""
        stem = "+".join([row.name, *(value_name(key, value) for key, value in values.items())])
        recipe = row.config(self.recipe)
        cells = {}
        for seed in self.seeds:
            name = f"{stem}-seed{seed}"
            config = override_config(recipe, {**values, "seed": seed, "output": self._folder(name)})
            cells[seed] = Cell(name, config, self.data.made_from(config))
        return Trial(values, cells)

    def single(self, task: Task, values: Mapping[str, Any]) -> dict[int, Cell]:
        """LoRAs trained on one task, by seed: the recipe's epochs, and its schedule scaled to the task's rows."""
        recipe = override_config(self.recipe, values)
        share = len(task.train) / sum(len(one.train) for one in self.data.tasks(recipe))
        steps = recipe.training.max_steps
        alone = {
            "adapter.method": "lora",
            "tasks": [one.model_dump(mode="json") for one in recipe.tasks if one.name == task.name],
            "mixing": {},
            "evaluation.references": {},
            # The validation rows may belong to other tasks; without any, load_best would be rejected.
            "training.load_best": recipe.training.load_best and bool(task.validation),
            "training.warmup_steps": round(recipe.training.warmup_steps * share),
            "training.max_steps": None if steps is None else max(1, round(steps * share)),
        }
        cells = {}
        for seed in self.seeds:
            name = f"{SINGLE}{task.name}-seed{seed}"
            seeded = override_config(recipe, {"seed": seed, "output": self._folder(name)})
            cells[seed] = Cell(name, override_config(seeded, alone), self.data.made_from(seeded, task.name))
        return cells

    def base(self) -> Cell:
        """The untrained base model, scored on the test rows of the recipe's own seed."""
        config = override_config(self.recipe, {"output": str(self.directory / "base")})
        return Cell("base", config, self.data.made_from(config), kind="base")

    def _folder(self, name: str) -> str:
        if len(name) > _LONGEST_FOLDER:
            raise ConfigError(
                f"{name[:60]}…: the folder name of this run would have {len(name)} characters; at most "
                f"{_LONGEST_FOLDER} are allowed. Give the row a shorter name, or tune shorter values."
            )
        return str(self.directory / "cells" / name)


def _rows_key(recipe: RunConfig) -> str:
    parts = recipe.model_dump(mode="json", include={"tasks", "split", "prompt", "seed"})
    sources = [task[part] for task in parts["tasks"] for part in ("train", "validation", "test")]
    if not any(source and source["limit"] for source in sources):
        del parts["seed"]  # it only draws the rows that a `limit` keeps
    return json.dumps(parts)
