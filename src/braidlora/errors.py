"""One exception family. Every error is written for the user and carries the exit code of the command line.

A message says what was given, what was expected, and how to fix it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class BraidloraError(Exception):
    """Base class of the errors that braidlora raises deliberately; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(BraidloraError, ValueError):
    """A recipe, an override or an adapter configuration is not valid (exit code 2)."""

    exit_code = 2


class DataError(BraidloraError, ValueError):
    """A data file, row or task is unusable (exit code 3)."""

    exit_code = 3


class TrainingError(BraidloraError, RuntimeError):
    """Training stopped: non-finite loss, gradient or weight, or out of memory or disk space (exit code 4)."""

    exit_code = 4


class CheckpointError(BraidloraError, RuntimeError):
    """A checkpoint or adapter on disk is incomplete, damaged or incompatible (exit code 5)."""

    exit_code = 5


class FederationError(BraidloraError, RuntimeError):
    """A federated round could not be completed (exit code 6)."""

    exit_code = 6


class MergeError(BraidloraError, ValueError):
    """A token-routed adapter has no exact merged form, so it cannot be merged (exit code 2)."""

    exit_code = 2


class Interrupted(BraidloraError):  # noqa: N818 (not an error)
    """SIGINT or SIGTERM stopped training after the current step was saved (exit code 130 or 143)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)  # picklable, to cross process boundaries


class DataWarning(UserWarning):
    """Something is probably wrong with a recipe's rows; training goes on."""


_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "os error 12",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception from Python, torch, safetensors or the OS means out of memory. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    foreign = isinstance(error, RuntimeError | OSError | SafetensorError)
    return foreign and any(text in str(error).lower() for text in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the name of its class."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory into a TrainingError: what ran out, the system's message, and what to do."""
    try:
        yield
    except BraidloraError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"{what} ({first_line(error)[:200]}). {remedy}") from error


@contextmanager
def explain_write_failures(path: Path, then: str, intact: Callable[[], str] = str) -> Iterator[None]:
    """Turn a failed write into a TrainingError.

    Args:
        path: named if the system's error does not name a file.
        then: what to do after making space.
        intact: called after a failure: what is still there, as a sentence.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or error
        kept = f"{intact()} ".lstrip()
        raise TrainingError(
            f"{place}: cannot be written: {reason}. {kept}Free space on that disk or make it writable, {then}."
        ) from error
