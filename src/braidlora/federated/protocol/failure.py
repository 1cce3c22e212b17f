"""What a server hears of a client's failure: a class and a code. The text stays with the client."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from braidlora.errors import DataError, TrainingError

ERRORS = "errors.log"  # in a client's own folder


@dataclass(frozen=True)
class Failure:
    """Why a client failed, as far as it may travel: exception texts can hold rows.

    Args:
        kind: name of the exception's class.
        code: `not-finite` (a loss, gradient or weight), `out-of-memory`, `data`, `disk`, or `internal` for all else.
    """

    kind: str
    code: str

    def __str__(self) -> str:
        return f"{self.kind} [{self.code}]"


def failure_of(error: BaseException) -> Failure:
    """The class and the code of an exception."""
    return Failure(type(error).__name__, _code(error))


def keep_at_site(error: BaseException, site: Path, round: int) -> None:
    """Append the whole exception to the client's own log.

    Raises:
        OSError: it cannot be written; a link in its place is not followed.
    """
    site.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = "".join(traceback.format_exception(error))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(site / ERRORS, flags, 0o600), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time} round {round}: {failure_of(error)}\n{text}\n")


def _code(error: BaseException) -> str:
    cause = error.__cause__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out-of-memory"
    if isinstance(error, TrainingError):
        if cause is None:  # what `train` raises where a number is not finite
            return "not-finite"
        return "disk" if isinstance(cause, OSError) else "out-of-memory"
    if isinstance(error, DataError):
        return "data"
    return "disk" if isinstance(error, OSError) else "internal"
