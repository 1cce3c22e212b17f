"""Errors of the system (a full disk, too little memory) as messages that say what is intact and what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from braidlora.errors import BraidloraError, TrainingError, is_out_of_memory
from braidlora.runs import RunDirectory


@contextmanager
def explain_disk_failures(
    directory: RunDirectory, then: str = "--resume auto; or give another --output"
) -> Iterator[None]:
    """Turn a failed write into a TrainingError.

    Args:
        directory: that the block writes into.
        then: what to do once there is space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{getattr(error, 'filename', None) or directory.path}: cannot be written: "
            f"{getattr(error, 'strerror', None) or error}. {_intact(directory)}"
            f"Free space on that disk or make it writable, then {then}."
        ) from error


def save_failed(directory: RunDirectory, step: int, error: Exception) -> TrainingError:
    """The error for a checkpoint that could not be written."""
    text = str(error).split("\n")[0]
    return TrainingError(
        f"{directory.checkpoint(step)}: could not be saved: {text}. "
        f"{_intact(directory) or 'There is no earlier checkpoint. '}"
        "Free space on that disk or make it writable (training.keep_checkpoints=1 needs the least), then "
        "--resume auto; or copy the run directory to another disk and give that as --output."
    )


def _intact(directory: RunDirectory) -> str:
    names = [directory.checkpoint(step).name for step in directory.checkpoint_steps()]
    return f"Intact: {', '.join(names)}. " if names else ""


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn running out of memory, in a step or a validation, into a TrainingError."""
    try:
        yield
    except BraidloraError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).split("\n")[0]
        raise TrainingError(
            f"out of memory: {first} The last checkpoint is intact. Halve training.batch_size and double "
            "training.gradient_accumulation (the same steps in half the memory), set "
            "training.gradient_checkpointing=true, lower prompt.cutoff, or set model.quantization; for a validation "
            "lower evaluation.batch_size. The first two and the last may change in the middle of a run: --resume auto "
            "--allow-inexact-resume."
        ) from error
