"""A cell is one run of a comparison: its folder, its recipe, and the note that marks it as done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braidlora.config import NOTHING, ModelSection, RunConfig, is_default, json_differences, load_config
from braidlora.errors import CheckpointError
from braidlora.evaluation.balance import balance
from braidlora.evaluation.scoring import row_values
from braidlora.models.fingerprint import base_fingerprint
from braidlora.models.identity import architecture
from braidlora.models.location import local_folder
from braidlora.models.old_fingerprints import is_old, sampled_files
from braidlora.runs import (
    BASE_CONFIG,
    PREDICTIONS,
    RunDirectory,
    atomic_write_text,
    cover,
    covered,
    hold,
    json_text,
    parse_jsonl,
    read_json,
    read_jsonl,
)

NOTE = "cell.json"
_PREDICTIONS = f"{PREDICTIONS}/"
_KEYS = ("recipe", "made_from", "evaluated", "validation_loss", "peak_memory_mib", "memory")


@dataclass(frozen=True)
class Cell:
    """One run: a model to train and score, or the base model to score.

    Args:
        name: the folder's name.
        config: the recipe; its `output` is the folder.
        made_from: fingerprints of data and base; a finished cell is reused only if they are the same.
        kind: `base` scores the untrained base model.
        evaluate: False does not score the test rows, as in tuning.
    """

    name: str
    config: RunConfig
    made_from: dict[str, Any]
    kind: Literal["train", "base"] = "train"
    evaluate: bool = True

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(Path(self.config.output))

    def is_done(self) -> bool:
        """Whether all results of this cell are on disk."""
        if not (self.run.path / NOTE).is_file():
            return False
        listed = covered(self.run.path) or {}
        if NOTE not in listed or not all((self.run.path / name).exists() for name in listed):
            return False  # version 0.1 wrote no manifest; running the cell again does, without training
        if not self.evaluate:
            return True
        return (
            bool(self.note()["evaluated"]) and self.run.metrics.is_file() and _PREDICTIONS in "".join(listed)
        )

    def write_note(self, peak_memory_mib: float | None, memory: str) -> None:
        """Mark the cell as done; written last. `memory` says what the peak was measured on."""
        note = {
            "recipe": _recipe(self.config),
            "made_from": self.made_from,
            "evaluated": self.evaluate,
            "validation_loss": self._validation_loss(),
            "peak_memory_mib": peak_memory_mib,
            "memory": memory,
        }
        text = json_text(note)
        cover(self.run.path, (), {NOTE: text.encode()})
        atomic_write_text(self.run.path / NOTE, text)

    def note(self) -> dict[str, Any]:
        """The note that `write_note` wrote.

        Raises:
            CheckpointError: the file is damaged or not a note.
        """
        path = self.run.path / NOTE
        note = self.run.read_json(NOTE)
        missing = [key for key in _KEYS if not isinstance(note, dict) or key not in note]
        if missing:
            raise CheckpointError(
                f"{path}: not the record of a finished run: {', '.join(missing)} missing. Remove the file to resume "
                "the run, or use --overwrite to train all runs again."
            )
        return dict(note)

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`, with every mean checked against the predictions.

        Raises:
            CheckpointError: it or a prediction file is missing or has changed, or they do not match.
        """
        metrics: dict[str, Any] = self.run.read_json(self.run.metrics.name)
        tasks = metrics["tasks"]
        for task, entry in tasks.items():
            scores = self.scores(task)
            if len(scores) != entry["n"] or not _equal(entry["score"], math.fsum(scores) / len(scores)):
                raise self._mismatch(f"it lists {entry['score']} over {entry['n']} rows for {task}")
        spread = balance({task: entry["score"] for task, entry in tasks.items()})
        if not all(_equal(metrics[key], getattr(spread, key)) for key in ("mean", "worst", "std")):
            raise self._mismatch(f"it lists {metrics['mean']} as the mean over tasks")
        return metrics

    def scores(self, task: str) -> list[float]:
        """What each of a task's test rows contributes to its score, which is the mean, in order.

        Raises:
            CheckpointError: the file is missing, has changed, or lacks a score from 0 to 100 for each row.
        """
        name = f"{_PREDICTIONS}{task}.jsonl"
        path = self.run.path / name
        if name not in (covered(self.run.path) or {}):
            raise CheckpointError(f"{path}: not a file that this run's evaluation wrote. {self._remedy()}")
        records = parse_jsonl(path, self.run.read(name))
        try:
            in_order = [record["index"] for record in records] == list(range(len(records)))
            scores = [float(record["score"]) for record in records]
            entry = self.run.read_json(self.run.metrics.name)["tasks"][task]
            values = row_values(entry["metric"], records, entry.get("labels"), entry.get("positive"))
        except (KeyError, TypeError, ValueError):
            in_order, scores = False, []
        if not scores or not in_order or not all(0 <= score <= 100 for score in scores):
            raise CheckpointError(
                f"{path}: expected one score from 0 to 100 for every row, in the rows' order. {self._remedy()}"
            )
        return values

    def _mismatch(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.run.metrics}: does not match the predictions next to it: {what}. {self._remedy()}"
        )

    def _remedy(self) -> str:
        return f"`braidlora evaluate {self.run.path}` recreates both from the adapter."

    def clear(self) -> None:
        """Remove the run, so that it starts over."""
        if self.run.path.is_dir():
            with hold(self.run.path):
                (self.run.path / NOTE).unlink(missing_ok=True)
                self.run.clear()

    def _validation_loss(self) -> float | None:
        """The loss of the run's final adapter: the lowest with `load_best`, else the last."""
        if not self.run.log.is_file():
            return None
        lines = read_jsonl(self.run.log)
        losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
        if not losses:
            return None
        return float(min(losses) if self.config.training.load_best else losses[-1])


def refuse_other_runs(cells: Sequence[Cell]) -> None:
    """Raise CheckpointError, with every difference, if a folder holds a run of another recipe, data or base."""
    problems: list[str] = []
    for cell in cells:
        found, wanted = _recorded(cell), {"recipe": _recipe(cell.config), "made_from": dict(cell.made_from)}
        if is_old(str(found["made_from"]["base"])):
            wanted["made_from"]["base"] = sampled_files(local_folder(cell.config.model))
        problems += [
            f"{cell.name}: {key.split('.', 1)[1]}: {_short(old)} there, {_short(new)} now"
            for key, old, new in json_differences(found, wanted)
            if not _base_unknown(key, old, new) and not _added_later(key, old, new)
        ]
    if problems:
        folder = cells[0].run.path.parent
        raise CheckpointError(
            f"{folder}: contains runs of another comparison.\n  "
            + "\n  ".join(problems[:12])
            + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
            + "\nUse the recipe they were made with, --overwrite to train them again, or another --output=PATH."
        )


def _base_unknown(key: str, old: Any, new: Any) -> bool:
    """Whether one side does not record its base: the run itself downloaded it, or the note is from braidlora 0.1.

    Of configurations, only settings that both have are compared; the others are defaults of another version.
    """
    if key == "made_from.base" or key == "made_from.architecture":
        return None in (old, new) or NOTHING in (old, new)
    return key.startswith("made_from.architecture.") and NOTHING in (old, new)


def _added_later(key: str, old: Any, new: Any) -> bool:
    """Whether this key of the recipe is newer than the note and has its default value."""
    section, _, rest = key.partition(".")
    return section == "recipe" and old == NOTHING and is_default(RunConfig, rest, new)


def _recorded(cell: Cell) -> dict[str, Any]:
    """Recipe and origin recorded in the cell's folder; the cell's own if nothing is recorded.

    An unfinished run is compared by its recipe alone; resuming it compares data and base.
    """
    own = {"recipe": _recipe(cell.config), "made_from": cell.made_from}
    if (cell.run.path / NOTE).is_file():
        note = cell.note()
        return {key: note[key] for key in own}
    if cell.run.state() in ("resumable", "finished"):
        content = cell.run.read(cell.run.config.name)
        return {**own, "recipe": _recipe(load_config(cell.run.config, content=content))}
    return own


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:16] + "…"


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The recipe as JSON, without its output: a comparison may be moved."""
    recipe = config.model_dump(mode="json")
    del recipe["output"]
    return recipe


def base_origin(model: ModelSection) -> dict[str, Any]:
    """What identifies a cell's base: the fingerprint of its stored weights, and its configuration.

    Both are None if it has not been downloaded yet.
    """
    folder = local_folder(model)
    if folder is None:
        return {"base": None, "architecture": None}
    path = folder / BASE_CONFIG
    config = read_json(path) if path.is_file() else {}
    return {"base": base_fingerprint(model), "architecture": architecture(config)}
