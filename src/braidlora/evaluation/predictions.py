"""Predictions on disk: one JSON line per row, written as they are made, so that a killed evaluation can resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError
from braidlora.json_text import loads
from braidlora.runs import atomic_write_json, atomic_write_text

logger = logging.getLogger(__name__)

_FIELDS = {"index", "prompt", "reference", "prediction", "extracted", "score"}


class PredictionFile:
    """`predictions/TASK.jsonl`, and `TASK.source.json`, which identifies what made the predictions.

    A line holds index, prompt, reference, prediction, extracted and score. Lines are appended in the order in which
    rows were answered; `finish` sorts them by row. Predictions are reused only if nothing in the source changed; a line
    that a kill truncated is dropped, and its row answered again.

    Args:
        directory: the folder `predictions`; it is created.
        task: name of the task.
        source: digests of everything that a prediction depends on, by a readable name (`adapter`, `data`, …).
        rows: number of rows in the task.
        resume: False starts over.

    Raises:
        ConfigError: one of the files is a link, which might lead elsewhere.
    """

    def __init__(
        self, directory: Path, task: str, source: Mapping[str, str], rows: int, *, resume: bool = True
    ) -> None:
        self.path = directory / f"{task}.jsonl"
        self.rows = rows
        self.records: dict[int, dict[str, Any]] = {}
        source_path = directory / f"{task}.source.json"
        for path in (directory, self.path, source_path):
            if path.is_symlink():
                raise ConfigError(
                    f"{path}: is a link; predictions are written to regular files only. Remove it."
                )
        directory.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists() and self._same_source(source_path, source):
            self._recover()
        else:
            # Old lines first: after a kill in between they must not appear to come from the new source.
            self.path.unlink(missing_ok=True)
            atomic_write_json(source_path, dict(source))

    def review(self, remake: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Recompute the stored records from their answers.

        Args:
            remake: computes a record from a stored one's index and prediction. If its prompt or reference differs, the
                row is answered again; if its extracted answer or score differs, these are replaced.
        """
        records, corrected = {}, 0
        for index, old in self.records.items():
            new = remake(old) if isinstance(old["prediction"], str) else None
            if new is not None and (old["prompt"], old["reference"]) == (new["prompt"], new["reference"]):
                records[index] = new
                corrected += new != old
        dropped = len(self.records) - len(records)
        if not corrected and not dropped:
            return
        logger.warning(
            "%s: %d scores did not match their predictions and were recomputed; %d rows belong to other "
            "prompts and are answered again",
            self.path, corrected, dropped,
        )  # fmt: skip
        self.records = records
        atomic_write_text(self.path, "".join(map(_line, records.values())))

    @property
    def missing(self) -> list[int]:
        """Rows that have no prediction yet, ascending."""
        return [index for index in range(self.rows) if index not in self.records]

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is with the operating system when this returns."""
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(_line(record))
        self.records[record["index"]] = record

    def finish(self) -> list[dict[str, Any]]:
        """Sort the lines by row and return them. Every row must have been answered."""
        assert not self.missing, f"{self.path}: rows {self.missing[:5]} have no prediction"
        ordered = [self.records[index] for index in range(self.rows)]
        if list(self.records) != list(range(self.rows)):
            atomic_write_text(self.path, "".join(map(_line, ordered)))
        return ordered

    def _same_source(self, path: Path, source: Mapping[str, str]) -> bool:
        try:
            found = loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found == dict(source):
            return True
        if isinstance(found, dict):
            changed = sorted(key for key in {*found, *source} if found.get(key) != source.get(key))
            logger.warning("%s: created with different %s; answering again", self.path, ", ".join(changed))
        else:
            logger.warning("%s: its source is unknown; answering again", self.path)
        return False

    def _recover(self) -> None:
        data = self.path.read_bytes()
        for line in data.split(b"\n"):
            record = _parse(line)
            if record is not None and 0 <= record["index"] < self.rows:
                self.records.setdefault(record["index"], record)
        text = "".join(map(_line, self.records.values()))
        if text.encode() != data:
            atomic_write_text(self.path, text)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record, or None for a line that a kill truncated."""
    try:
        record = loads(line)
    except ValueError:  # also undecodable bytes
        return None
    if not isinstance(record, dict) or set(record) != _FIELDS or type(record["index"]) is not int:
        return None
    return record
