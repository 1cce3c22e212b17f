"""What a server learns of a client's failure: a class and a code. The text stays with the client."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from braidlora.errors import CheckpointError, DataError, TrainingError

CODES = (
    "not-finite",  # a loss, gradient or weight
    "out-of-memory",
    "data",
    "disk",
    "state",  # the client's stored state is missing, damaged, or not what the server counts
    "internal",  # all else
    # What a server says of a client that a network reaches:
    "late",  # no answer before the deadline
    "unreachable",
    "invalid",  # the answer is not one
)


@dataclass(frozen=True)
class Failure:
    """Why a client failed, as far as it may travel: exception texts can contain rows.

    Args:
        kind: name of the exception's class.
        code: one of CODES.
    """

    kind: str
    code: str

    def __str__(self) -> str:
        return self.code if self.kind.lower() == self.code else f"{self.kind} [{self.code}]"


def failure_of(error: BaseException) -> Failure:
    """The class and the code of an exception."""
    return Failure(type(error).__name__, _code(error))


def _code(error: BaseException) -> str:
    cause = error.__cause__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out-of-memory"
    if isinstance(error, TrainingError):
        if cause is None:  # what `train` raises for a number that is not finite
            return "not-finite"
        return "disk" if isinstance(cause, OSError) else "out-of-memory"
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, CheckpointError):
        return "state"
    return "disk" if isinstance(error, OSError) else "internal"
