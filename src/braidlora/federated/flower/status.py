"""What a server is doing, as a file that `braidlora site status` reads."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from braidlora.runs import atomic_write_json

_log = logging.getLogger("braidlora.federated")


_NEW = {"connected": False, "seen": None, "waiting_since": None, "last": None, "base": None}


class Status:
    """Tells the log, and nobody else."""

    def phase(self, text: str, round: int | None = None) -> None:
        """Something begins."""
        _log.info("%s", text)

    def note(self, text: str) -> None:
        """Something that an operator should know."""
        _log.warning("%s", text)

    def connected(self, sites: Iterable[str]) -> None:
        """These sites are connected now."""

    def asked(self, site: str) -> None:
        """A site's answer is awaited."""

    def answered(self, site: str, outcome: str) -> None:
        """A site has answered, or will not: `answered`, or the code of its failure."""

    def welcomed(self, site: str, base: Mapping[str, str]) -> None:
        """A site may take part; `base` is the dtype and the quantization of its base model."""


class StatusFile(Status):
    """Keeps a JSON file up to date.

    Args:
        path: of the file.
        output: the run directory.
        job: name of the job file.
        sites: all sites.
    """

    def __init__(self, path: Path, output: Path, job: str, sites: Iterable[str]) -> None:
        self._path, self._written = path, 0.0
        self._notes: list[str] = []
        self._value: dict[str, Any] = {
            "pid": os.getpid(),
            "job": job,
            "output": str(output),
            "phase": "starting",
            "round": None,
            "sites": {site: dict(_NEW) for site in sites},
            "notes": self._notes,
        }  # fmt: skip
        self._write()

    def phase(self, text: str, round: int | None = None) -> None:
        super().phase(text, round)
        self._value["phase"], self._value["round"] = text, round
        self._write()

    def note(self, text: str) -> None:
        super().note(text)
        self._notes.append(f"{now_text()} {text}")
        del self._notes[:-50]
        self._write()

    def connected(self, sites: Iterable[str]) -> None:
        there = set(sites)
        for site, one in self._value["sites"].items():
            one["connected"] = site in there
            if site in there:
                one["seen"] = now_text()
        if time.monotonic() - self._written > 1.0:
            self._write()

    def asked(self, site: str) -> None:
        self._value["sites"][site]["waiting_since"] = now_text()
        self._write()

    def answered(self, site: str, outcome: str) -> None:
        self._value["sites"][site].update(waiting_since=None, last=outcome)
        self._write()

    def welcomed(self, site: str, base: Mapping[str, str]) -> None:
        self._value["sites"][site]["base"] = dict(base)
        self._write()

    def _write(self) -> None:
        self._value["updated"] = now_text()
        try:
            atomic_write_json(self._path, self._value)
            self._written = time.monotonic()
        except OSError as error:  # a full disk must not end a round that needs no more of it
            _log.warning("%s: %s", self._path, error.strerror)


def now_text() -> str:
    """The time, as the status file has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
