"""The progress bar of a run: epoch, steps, loss, remaining time."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """A tqdm bar on stderr. It shows the loss of the last log, so it never waits for the device."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._bar is None or not logs:
            return
        for key, name in (("loss", "loss"), ("eval_loss", "validation")):
            if key in logs:
                self._losses[name] = f"{logs[key]:.4f}"
        if self._losses:
            self._bar.set_postfix({"epoch": f"{state.epoch:.2f}", **self._losses}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the line, also after training failed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
