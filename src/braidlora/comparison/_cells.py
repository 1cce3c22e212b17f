"""A cell is one run of a comparison: its folder, its recipe, and the note that says whether it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braidlora.config import NOTHING, ModelSection, RunConfig, is_default, json_differences, load_config
from braidlora.errors import CheckpointError
from braidlora.evaluation.balance import balance
from braidlora.models.base import local_folder
from braidlora.models.fingerprint import base_fingerprint
from braidlora.models.identity import architecture
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
    """What one process trains, or, for the base model, only scores.

    Args:
        name: the folder's name.
        config: the recipe; its `output` is the folder.
        made_from: fingerprints of data and base, which must be the same for a finished cell to be reused.
        kind: `base` scores the base model as it is.
        evaluate: False leaves the test rows alone, as in tuning.
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
        """Whether everything this cell is for is on disk."""
        if not (self.run.path / NOTE).is_file():
            return False
        listed = covered(self.run.path) or {}
        if NOTE not in listed or not all((self.run.path / name).exists() for name in listed):
            return False  # version 0.1 vouched for nothing; looking at the run again does, and trains nothing
        if not self.evaluate:
            return True
        return (
            bool(self.note()["evaluated"]) and self.run.metrics.is_file() and _PREDICTIONS in "".join(listed)
        )

    def write_note(self, peak_memory_mib: float | None, memory: str) -> None:
        """Say that the cell is done; written last. `memory` says what the peak is the peak of."""
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
        """What `write_note` wrote.

        Raises:
            CheckpointError: the file is damaged, or no note.
        """
        path = self.run.path / NOTE
        note = self.run.read_json(NOTE)
        missing = [key for key in _KEYS if not isinstance(note, dict) or key not in note]
        if missing:
            raise CheckpointError(
                f"{path}: no note of a run that is done: {', '.join(missing)} missing. Remove the file, and the run is "
                "carried on with; or --overwrite trains all runs again."
            )
        return dict(note)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds, with every mean computed again from the predictions.

        Raises:
            CheckpointError: it, or a prediction file, is missing, has changed, or does not fit the other.
        """
        metrics: dict[str, Any] = self.run.read_json(self.run.metrics.name)
        tasks = metrics["tasks"]
        for task, entry in tasks.items():
            scores = self.scores(task)
            if len(scores) != entry["n"] or not _equal(entry["score"], math.fsum(scores) / len(scores)):
                raise self._misfit(f"{task} has {entry['score']} over {entry['n']} rows there")
        spread = balance({task: entry["score"] for task, entry in tasks.items()})
        if not all(_equal(metrics[key], getattr(spread, key)) for key in ("mean", "worst", "std")):
            raise self._misfit(f"the mean over tasks is {metrics['mean']} there")
        return metrics

    def scores(self, task: str) -> list[float]:
        """The scores of a task's test rows, in their order.

        Raises:
            CheckpointError: the file is missing, has changed, or does not hold one score from 0 to 100 per row.
        """
        name = f"{_PREDICTIONS}{task}.jsonl"
        path = self.run.path / name
        if name not in (covered(self.run.path) or {}):
            raise CheckpointError(f"{path}: not what this run's evaluation left. {self._remedy()}")
        records = parse_jsonl(path, self.run.read(name))
        try:
            in_order = [record["index"] for record in records] == list(range(len(records)))
            scores = [float(record["score"]) for record in records]
        except (KeyError, TypeError, ValueError):
            in_order, scores = False, []
        if not scores or not in_order or not all(0 <= score <= 100 for score in scores):
            raise CheckpointError(
                f"{path}: expected one score from 0 to 100 for every row, in the rows' order. {self._remedy()}"
            )
        return scores

    def _misfit(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.run.metrics}: does not follow from the predictions beside it: {what}. {self._remedy()}"
        )

    def _remedy(self) -> str:
        return f"`braidlora evaluate {self.run.path}` makes both again from the adapter."

    def clear(self) -> None:
        """Remove the run, so that it starts over."""
        if self.run.path.is_dir():
            with hold(self.run.path):
                (self.run.path / NOTE).unlink(missing_ok=True)
                self.run.clear()

    def _validation_loss(self) -> float | None:
        """The loss of the adapter that the run ends with: the lowest with `load_best`, else the last."""
        if not self.run.log.is_file():
            return None
        lines = read_jsonl(self.run.log)
        losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
        if not losses:
            return None
        return float(min(losses) if self.config.training.load_best else losses[-1])


def refuse_other_runs(cells: Sequence[Cell]) -> None:
    """Raise where a folder holds a run of another recipe, other data or another base.

    Raises:
        CheckpointError: with every difference, what is there and what is wanted.
    """
    problems: list[str] = []
    for cell in cells:
        found, wanted = _standing(cell), {"recipe": _recipe(cell.config), "made_from": dict(cell.made_from)}
        if is_old(str(found["made_from"]["base"])):
            wanted["made_from"]["base"] = sampled_files(local_folder(cell.config.model))
        problems += [
            f"{cell.name}: {key.split('.', 1)[1]}: {_short(old)} there, {_short(new)} now"
            for key, old, new in json_differences(found, wanted)
            if not _unknown(key, old, new) and not _later(key, old, new)
        ]
    if problems:
        folder = cells[0].run.path.parent
        raise CheckpointError(
            f"{folder}: holds runs of another comparison.\n  "
            + "\n  ".join(problems[:12])
            + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
            + "\nUse the recipe they were made with, --overwrite to train them again, or another --output=PATH."
        )


def _unknown(key: str, old: Any, new: Any) -> bool:
    """Whether one side does not know its base: the run itself downloaded it, or the note is of braidlora 0.1.

    Of configurations only settings that both have are compared: others are defaults of another version.
    """
    if key == "made_from.base" or key == "made_from.architecture":
        return None in (old, new) or NOTHING in (old, new)
    return key.startswith("made_from.architecture.") and NOTHING in (old, new)


def _later(key: str, old: Any, new: Any) -> bool:
    """Whether this is a key of the recipe that the version which wrote the note did not have, at its default."""
    section, _, rest = key.partition(".")
    return section == "recipe" and old == NOTHING and is_default(RunConfig, rest, new)


def _standing(cell: Cell) -> dict[str, Any]:
    """Recipe and origin of what stands in the cell's folder; the cell's own where that is still open.

    A run that is not done is compared by its recipe alone: resuming it compares data and base.
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
    """The recipe as JSON, but for the place: a comparison may be moved."""
    recipe = config.model_dump(mode="json")
    del recipe["output"]
    return recipe


def base_origin(model: ModelSection) -> dict[str, Any]:
    """What a cell's base is known by: the fingerprint of its stored weights, and its configuration.

    Both are None where it has not been downloaded yet.
    """
    folder = local_folder(model)
    if folder is None:
        return {"base": None, "architecture": None}
    path = folder / BASE_CONFIG
    config = read_json(path) if path.is_file() else {}
    return {"base": base_fingerprint(model), "architecture": architecture(config)}
