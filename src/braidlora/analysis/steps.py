"""Which step the adapters of a run are from: its result is the last one, or with `load_best` an earlier one."""

from __future__ import annotations

from typing import NamedTuple

from braidlora.config import RunConfig
from braidlora.runs import RunDirectory, parse_jsonl


class Steps(NamedTuple):
    """Optimizer steps of a finished run: how many it took, and the one that its `adapter` is from."""

    last: int
    adapter: int


def steps_of(run: RunDirectory, config: RunConfig) -> Steps:
    """The steps of a run, from its log: checkpoints may be gone.

    Args:
        config: the run's own recipe.

    Raises:
        CheckpointError: the log is missing, has changed, or is damaged.
    """
    lines = parse_jsonl(run.log, run.read(run.log.name))
    last = max((line["step"] for line in lines), default=0)
    validated = [line for line in lines if "validation_loss" in line]
    if not config.training.load_best or not validated:
        return Steps(last, last)
    return Steps(last, min(validated, key=lambda line: line["validation_loss"])["step"])  # ties: the first
