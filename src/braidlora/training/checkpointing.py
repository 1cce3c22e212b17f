"""Checkpoints that are whole or absent, and a resume that goes on to the bit.

transformers writes its checkpoint files one by one into the final folder. Here they are staged in a hidden folder,
synced, listed with their sha256 in a manifest, and renamed; only then are older checkpoints removed. Beside the
Trainer's own state, the sums since the last log are kept, so that a resumed run writes the log lines it would have
written.
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
from torch import nn
from transformers import TrainerCallback

from braidlora.errors import CheckpointError, TrainingError
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
from braidlora.training.checkpoint import (
    OPTIMIZER,
    SAMPLER,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    Checkpoint,
    Identity,
    progress_file,
    rng_file,
)
from braidlora.training.finite import refuse_weights
from braidlora.training.run_log import RunLog
from braidlora.training.trainer import MultiTaskTrainer


class CheckpointingTrainer(MultiTaskTrainer):
    """A `MultiTaskTrainer` that saves into a run directory and resumes from it.

    Args:
        directory: the run directory.
        identity: what a checkpoint has to match to be resumed.
        card: what the adapter in it means.
        keep: how many checkpoints stay, the best and the first one after warm-up apart.
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
        """Optimizer steps of the whole run."""
        by_epochs = math.ceil(self.args.num_train_epochs * self.steps_per_epoch())
        return self.args.max_steps if self.args.max_steps > 0 else by_epochs

    # ---- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything that a resume needs as `checkpoints/step-N`, then remove what is no longer kept.

        Raises:
            TrainingError: a weight is not finite, or the disk is full or not writable; older checkpoints are intact.
        """
        step = self.state.global_step
        refuse_weights(self.model, step)
        target = self.directory.checkpoint(step)
        # The first process names the folder that all of them write into.
        staging = Path(broadcast_object_list([str(temporary_name(target))])[0])
        with self._failures_told(target, staging):
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
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        progress = {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tasks": self.meter.state(),
            "seconds": self.run_log.seconds(),
        }
        (folder / progress_file(self.args.process_index)).write_text(json.dumps(progress))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE))
            (folder / SAMPLER).write_text(json.dumps(self._sampler_state()))
            (folder / IDENTITY).write_text(json.dumps(asdict(self.identity), indent=1))
            (folder / LOG).write_text(self.run_log.text(), encoding="utf-8")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: no pickled arguments, no tokenizer."""
        if self.args.should_save:
            assert output_dir is not None
            model = self.accelerator.unwrap_model(self.model)
            save_adapter(model, Path(output_dir), state_dict, self.card)

    def _sampler_state(self) -> dict[str, Any]:
        epoch, steps = divmod(self.state.global_step, self.steps_per_epoch())
        return {"epoch": epoch, "steps": steps, "order": self._order(epoch)}

    def _order(self, epoch: int) -> str:
        """sha256 of the epoch's draws, which says whether the mixture is still the same."""
        return hashlib.sha256(json.dumps(self.sampler.drawn(epoch)).encode()).hexdigest()

    def _prune(self) -> None:
        # Later ones can only be there after a resume from an earlier one; they are not ours to remove.
        steps = [step for step in self.directory.checkpoint_steps() if step <= self.state.global_step]
        kept = set(steps[-self.keep :]) | {self.state.best_global_step}
        # B starts at zero, so how its direction changes is measured from the first checkpoint after warm-up.
        kept |= set([step for step in steps if step >= self.args.warmup_steps][:1])
        for step in steps:
            if step not in kept:
                remove_tree(self.directory.checkpoint(step))

    @contextlib.contextmanager
    def _failures_told(self, target: Path, staging: Path) -> Iterator[None]:
        try:
            yield
        except TrainingError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            with contextlib.suppress(OSError):  # a file system that just failed may fail here as well
                remove_tree(staging)
            raise save_failed(target, self.directory, error) from error

    # ---- resuming

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from a checkpoint or from the first step on.

        transformers reads by path. What it is given are private copies that were checked while they were made; the
        larger files are checked and read below.
        """
        if checkpoint is None:
            self.train()
            return
        self._checkpoint = checkpoint
        with checkpoint.copy((TRAINER_STATE, SCALER, self._rng_file())) as copy:
            self.train(resume_from_checkpoint=str(copy))

    def _rng_file(self) -> str:
        return rng_file(self.args.process_index, self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._checkpoint is not None
        restore_adapter(self.accelerator.unwrap_model(self.model), self._checkpoint)
        if self._checkpoint.lists(SAMPLER):
            saved = self._checkpoint.read_json(SAMPLER)
            if saved["order"] != self._order(saved["epoch"]):
                raise CheckpointError(
                    f"{self._checkpoint.directory / SAMPLER}: the mixture gives the rows in another order than when "
                    "this was saved; was it saved by another version of braidlora or numpy? Resume with that version."
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = self._checkpoint
        assert saved is not None
        if saved.lists(OPTIMIZER):
            with _damage_told(saved.directory / OPTIMIZER):
                self.optimizer.load_state_dict(_state(saved, OPTIMIZER))
        if saved.lists(SCHEDULER):
            with _damage_told(saved.directory / SCHEDULER):
                self.lr_scheduler.load_state_dict(_state(saved, SCHEDULER))
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
                for _ in range(self.state.global_step):  # the rate is a function of the step alone
                    self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self._checkpoint is not None
            with _damage_told(self._checkpoint.directory / self._rng_file()):
                super()._load_rng_state(checkpoint)

    def restore_progress(self) -> None:
        """Take up the sums since the last log where the checkpoint left them; called when training begins."""
        name = progress_file(self.args.process_index)
        if self._checkpoint is None or not self._checkpoint.lists(name):
            return
        progress = self._checkpoint.read_json(name)
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
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


def save_failed(target: Path, directory: RunDirectory, error: Exception) -> TrainingError:
    """The error of a save that the disk refused: what failed, what is intact, what helps."""
    intact = [directory.checkpoint(step).name for step in directory.checkpoint_steps()]
    text = str(error).split("\n")[0]
    return TrainingError(
        f"{target}: could not be saved: {text}. "
        + (f"Intact: {', '.join(intact)}. " if intact else "There is no earlier checkpoint. ")
        + "Free space on that disk or make it writable (training.keep_checkpoints=1 needs the least), then "
        "--resume auto; or copy the run directory to another disk and give that as --output."
    )


def _state(checkpoint: Checkpoint, name: str) -> Any:
    """A file of torch's, from bytes that were checked; nothing in it is run."""
    return torch.load(io.BytesIO(checkpoint.read(name)), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
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
        first = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: refused, since it does not hold plain tensors and numbers that fit this run: {first}"
        ) from error
