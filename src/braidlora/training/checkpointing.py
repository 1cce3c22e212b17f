"""Checkpoints that are complete or absent, and a resume that is bit-exact.

transformers writes its checkpoint files one by one into the final folder. Here they are staged in a hidden folder,
synced, listed with their sha256 in a manifest, and renamed; only then are older checkpoints removed. The sums since the
last log are saved with the Trainer's own state, so that a resumed run writes the log lines of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback

from braidlora.errors import CheckpointError, TrainingError, first_line
from braidlora.models.adapter_reader import restore_adapter
from braidlora.models.adapter_writer import save_adapter
from braidlora.runs import (
    IDENTITY,
    LOG,
    AdapterCard,
    RunDirectory,
    finish_directory,
    in_use,
    remove_tree,
    temporary_name,
)
from braidlora.training._trainer_compat import (
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    CheckpointHooks,
    rng_file,
)
from braidlora.training.checkpoint import SAMPLER, Checkpoint, Identity, progress_file
from braidlora.training.failures import save_failed
from braidlora.training.finite import refuse_weights
from braidlora.training.run_log import RunLog
from braidlora.training.trainer import MultiTaskTrainer


class CheckpointingTrainer(CheckpointHooks, MultiTaskTrainer):
    """A `MultiTaskTrainer` that saves into a run directory and resumes from it.

    Args:
        directory: the run directory.
        identity: what a checkpoint must match to be resumed.
        card: the `braidlora.json` of its adapter.
        keep: how many checkpoints to keep, apart from the best and the first one after warm-up.
        run_log: where log lines go.
    """

    def __init__(
        self,
        *args: Any,
        directory: RunDirectory,
        identity: Identity,
        card: AdapterCard,
        keep: int,
        run_log: RunLog,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.directory = directory
        self.identity, self.card = identity, card
        self.keep = keep
        self.run_log = run_log
        self._checkpoint: Checkpoint | None = None
        self.add_callback(_RestoreProgress(self))

    def total_steps(self) -> int:
        """Optimizer steps of the run, from its first to its last."""
        by_epochs = math.ceil(self.args.num_train_epochs * self.steps_per_epoch())
        return self.args.max_steps if self.args.max_steps > 0 else by_epochs

    # ---- saving

    def save_checkpoint(self) -> None:
        """Save everything that a resume needs as `checkpoints/step-N`, then remove older checkpoints.

        Raises:
            TrainingError: a weight is not finite, or the disk is full or not writable; older checkpoints are intact.
        """
        step = self.state.global_step
        refuse_weights(self.model, step)
        target = self.directory.checkpoint(step)
        # The first process names the folder that all of them write into.
        staging = Path(broadcast_object_list([str(temporary_name(target))])[0])
        with self._explain_failures(staging):
            if self.args.should_save:
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with in_use(staging):
                self._write_state(staging)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    finish_directory(staging, target)
                    self._prune()
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        self.write_trainer_files(folder)
        progress = {**self.loss_sums(), "tasks": self.meter.state(), "seconds": self.run_log.seconds()}
        (folder / progress_file(self.args.process_index)).write_text(json.dumps(progress))
        if self.args.should_save:
            (folder / SAMPLER).write_text(json.dumps(self._sampler_state()))
            (folder / IDENTITY).write_text(json.dumps(asdict(self.identity), indent=1))
            (folder / LOG).write_text(self.run_log.text(), encoding="utf-8")

    def save_weights(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        """The adapter alone: no pickled arguments, no tokenizer."""
        save_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict, self.card)

    def _sampler_state(self) -> dict[str, Any]:
        epoch, steps = divmod(self.state.global_step, self.steps_per_epoch())
        return {"epoch": epoch, "steps": steps, "order": self._order(epoch)}

    def _order(self, epoch: int) -> str:
        """sha256 of the epoch's draws, which shows whether the mixture is still the same."""
        return hashlib.sha256(json.dumps(self.sampler.drawn(epoch)).encode()).hexdigest()

    def _prune(self) -> None:
        # Later ones exist only after a resume from an earlier one; they are not ours to remove.
        steps = [step for step in self.directory.checkpoint_steps() if step <= self.state.global_step]
        kept = set(steps[-self.keep :]) | {self.state.best_global_step}
        # B starts at zero, so changes of its direction are measured from the first checkpoint after warm-up.
        kept |= set([step for step in steps if step >= self.args.warmup_steps][:1])
        for step in steps:
            if step not in kept:
                remove_tree(self.directory.checkpoint(step))

    @contextlib.contextmanager
    def _explain_failures(self, staging: Path) -> Iterator[None]:
        try:
            yield
        except TrainingError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            with contextlib.suppress(OSError):  # a file system that just failed may fail again
                remove_tree(staging)
            raise save_failed(self.directory, self.state.global_step, error) from error

    # ---- resuming

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from a checkpoint or from the first step on.

        transformers reads by path. It gets private copies that were checked while they were made; the larger files are
        checked and read below.
        """
        if checkpoint is None:
            self.train()
            return
        self._checkpoint = checkpoint
        with checkpoint.copy((TRAINER_STATE, SCALER, self._rng_file())) as copy:
            self.train(resume_from_checkpoint=str(copy))

    def _rng_file(self) -> str:
        return rng_file(self.args.process_index, self.args.world_size)

    def load_weights(self) -> None:
        """Put the checkpoint's adapter into the model, and make sure that the mixture is the same."""
        assert self._checkpoint is not None
        restore_adapter(self.accelerator.unwrap_model(self.model), self._checkpoint)
        if self._checkpoint.lists(SAMPLER):
            saved = self._checkpoint.read_json(SAMPLER)
            if saved["order"] != self._order(saved["epoch"]):
                raise CheckpointError(
                    f"{self._checkpoint.directory / SAMPLER}: the mixture yields the rows in a different order than "
                    "when this was saved; was it saved by another version of braidlora or numpy? Resume with that "
                    "version."
                )

    def load_optimizer_and_scheduler(self) -> None:
        """Read both from checked bytes; a scheduler that is missing is advanced to the step."""
        saved = self._checkpoint
        assert saved is not None
        if saved.lists(OPTIMIZER):
            with _explain_damage(saved.directory / OPTIMIZER):
                self.optimizer.load_state_dict(_state(saved, OPTIMIZER))
        if saved.lists(SCHEDULER):
            with _explain_damage(saved.directory / SCHEDULER):
                self.lr_scheduler.load_state_dict(_state(saved, SCHEDULER))
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
                for _ in range(self.state.global_step):  # the rate depends on the step alone
                    self.lr_scheduler.step()

    def load_random_states(self, folder: str) -> None:
        """Restore them from the private copy in `folder`."""
        assert self._checkpoint is not None
        with _explain_damage(self._checkpoint.directory / self._rng_file()):
            super().load_random_states(folder)

    def restore_progress(self) -> None:
        """Restore the sums since the last log from the checkpoint; called when training begins."""
        name = progress_file(self.args.process_index)
        if self._checkpoint is None or not self._checkpoint.lists(name):
            return
        progress = self._checkpoint.read_json(name)
        self.restore_loss_sums(progress)
        self.meter.restore(progress["tasks"])

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.should_save:
            self.run_log.add(self.state.global_step, logs)


class _RestoreProgress(TrainerCallback):
    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_progress()


def _state(checkpoint: Checkpoint, name: str) -> Any:
    """A file of torch's, read from checked bytes; no code in it is run."""
    return torch.load(io.BytesIO(checkpoint.read(name)), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        OSError,
        TypeError,
    ) as error:
        raise CheckpointError(
            f"{path}: rejected, because it contains something other than plain tensors and numbers that fit this run: "
            f"{first_line(error)}"
        ) from error
