"""`log.jsonl`: one JSON line per log; clock readings are under `timing`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from braidlora.errors import TrainingError, explain_write_failures
from braidlora.runs import LOG, Committed, atomic_write_text, split_lines
from braidlora.training.finite import REMEDY


class RunLog:
    """Writes log lines, and keeps them for checkpoints.

    A training line has `step, epoch, loss, tasks (loss by task), learning_rate, grad_norm, timing`; a validation line
    `step, epoch, validation_loss, validation_tasks, timing`.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []
        self._before = 0.0
        self._start = time.monotonic()

    def start(self, checkpoint: Committed | None, seconds: float = 0.0) -> None:
        """Begin with the lines of `checkpoint`, or with none; `seconds` of training came before it."""
        saved = checkpoint.read(LOG).decode() if checkpoint is not None else ""
        self._lines = split_lines(saved)
        self._before, self._start = seconds, time.monotonic()
        atomic_write_text(self.path, self.text())

    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self._before + time.monotonic() - self._start

    def text(self) -> str:
        return "".join(line + "\n" for line in self._lines)

    def add(self, step: int, logs: dict[str, Any]) -> None:
        """Write the line of one log of the Trainer; its closing summary is skipped.

        Raises:
            TrainingError: a number is not finite (a validation loss, say), or the file cannot be written.
        """
        line: dict[str, Any] = {"step": step, "epoch": logs.get("epoch")}
        if "loss" in logs:
            line |= {"loss": logs["loss"], "tasks": _per_task(logs, "loss/")}
            line |= {"learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
        elif "eval_loss" in logs:
            line |= {"validation_loss": logs["eval_loss"], "validation_tasks": _per_task(logs, "eval_loss/")}
        else:
            return
        line["timing"] = {"seconds": round(self.seconds(), 3)}
        try:
            text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise TrainingError(
                f"step {step}: not finite: {json.dumps(line, ensure_ascii=False)}. {REMEDY}"
            ) from None
        self._lines.append(text)
        with (
            explain_write_failures(self.path, "then --resume auto; checkpoints are intact"),
            open(self.path, "a", encoding="utf-8", newline="\n") as file,
        ):
            file.write(text + "\n")


def _per_task(logs: dict[str, Any], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): loss for key, loss in logs.items() if key.startswith(prefix)}
