"""Errors of the system (a full disk, too little memory) as messages that say what is intact and what helps."""

from __future__ import annotations

from contextlib import AbstractContextManager

from braidlora.errors import TrainingError, explain_out_of_memory, explain_write_failures, first_line
from braidlora.runs import RunDirectory


def explain_disk_failures(
    directory: RunDirectory, then: str = "then --resume auto; or give another --output"
) -> AbstractContextManager[None]:
    """Turn a failed write into a TrainingError that lists the intact checkpoints; `then` is what to do with space."""
    return explain_write_failures(directory.path, then, lambda: _intact(directory))


def save_failed(directory: RunDirectory, step: int, error: Exception) -> TrainingError:
    """The error for a checkpoint that could not be written."""
    return TrainingError(
        f"{directory.checkpoint(step)}: could not be saved: {first_line(error)}. "
        f"{_intact(directory) or 'There is no earlier checkpoint.'} "
        "Free space on that disk or make it writable (training.keep_checkpoints=1 needs the least), then "
        "--resume auto; or copy the run directory to another disk and give that as --output."
    )


def _intact(directory: RunDirectory) -> str:
    names = [directory.checkpoint(step).name for step in directory.checkpoint_steps()]
    return f"Intact: {', '.join(names)}." if names else ""


def explain_step_out_of_memory() -> AbstractContextManager[None]:
    """Turn running out of memory, in a step or a validation, into a TrainingError."""
    return explain_out_of_memory(
        "out of memory",
        "The last checkpoint is intact. Halve training.batch_size and double training.gradient_accumulation (the same "
        "steps in half the memory), set training.gradient_checkpointing=true, lower prompt.cutoff, or set "
        "model.quantization; for a validation lower evaluation.batch_size. The first two and the last may change in "
        "the middle of a run: --resume auto --allow-inexact-resume.",
    )
