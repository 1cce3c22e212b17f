"""Every private API of transformers' Trainer that braidlora uses, behind names of our own.

No other file overrides, calls or reads an underscored name of the Trainer. `missing_apis` says what an installed
version lacks; a test fails with that text. CHECKED lists the versions that the training and resume tests passed with.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.trainer
from torch import Tensor, nn
from transformers import Trainer

CHECKED = ("5.18.0", "5.23.0")

# Names that the Trainer gives to the files of a checkpoint.
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
TRAINER_STATE = "trainer_state.json"


def use_one_gpu(arguments: transformers.TrainingArguments) -> None:
    """Train on the first visible GPU: with several, one process would split each batch over them (DataParallel).

    A batch would then have `training.batch_size` rows per GPU, which the sampler and the schedule do not know of.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def rng_file(rank: int, world_size: int) -> str:
    """The file in which the Trainer saves the random states of process `rank`."""
    return "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"


class StepHooks(Trainer):
    """A Trainer whose private methods around a step are hooks; the subclass gives each of them its content."""

    def train_sampler(self) -> Any:
        """The sampler of the training rows."""
        raise NotImplementedError

    def targets_of_step(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """How many targets the accumulated batches of a step have, over all processes."""
        raise NotImplementedError

    def logged_learning_rate(self) -> float:
        """The learning rate to log."""
        raise NotImplementedError

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether a validation is the best so far; it is noted in the state."""
        raise NotImplementedError

    def to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with its tensors on the model's device."""
        return self._prepare_inputs(inputs)

    def notify_evaluated(self, metrics: dict[str, float]) -> None:
        """Tell the callbacks of a validation."""
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        return self.targets_of_step(batch_samples, device)

    def _get_learning_rate(self) -> float:
        return self.logged_learning_rate()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.is_best(metrics)


class CheckpointHooks(Trainer):
    """A Trainer that saves and resumes through hooks; the subclass gives each of them its content."""

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the current step."""
        raise NotImplementedError

    def save_weights(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Save the adapter into a folder; called by one process."""
        raise NotImplementedError

    def load_weights(self) -> None:
        """Put the weights of the checkpoint that the run resumes from into the model."""
        raise NotImplementedError

    def load_optimizer_and_scheduler(self) -> None:
        """Restore both from the checkpoint that the run resumes from."""
        raise NotImplementedError

    def load_random_states(self, folder: str) -> None:
        """Restore the states of all generators from a folder that has `rng_file`."""
        super()._load_rng_state(folder)

    def write_trainer_files(self, folder: Path) -> None:
        """Write model, optimizer, scheduler, scaler, random states and, in one process, the trainer's state."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE))

    def loss_sums(self) -> dict[str, Any]:
        """The Trainer's sums since the last log, and the step of that log."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def restore_loss_sums(self, sums: dict[str, Any]) -> None:
        """Set what `loss_sums` returned; call it after the Trainer has initialized them, when training begins."""
        self._tr_loss.fill_(sums["loss"])
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["last_logged"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            assert output_dir is not None
            self.save_weights(Path(output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_optimizer_and_scheduler()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_random_states(checkpoint)


@dataclass(frozen=True)
class _Method:
    """A private method, the parameters we rely on, and what for; `overridden` if the Trainer must call it itself."""

    name: str
    parameters: tuple[str, ...]
    purpose: str
    overridden: bool = True


_METHODS = (
    _Method("_get_train_sampler", ("train_dataset",), "rows come in the order of the mixture"),
    _Method("_get_num_items_in_batch", ("batch_samples", "device"), "a step's loss is a mean over all its targets"),
    _Method("_get_learning_rate", (), "the log shows the rate before multipliers"),
    _Method("_determine_best_metric", ("metrics", "trial"), "the best validation is the lowest mean over tasks"),
    _Method("_save_checkpoint", ("model", "trial"), "checkpoints are complete or absent"),
    _Method("_save", ("output_dir", "state_dict"), "a checkpoint holds the adapter alone"),
    _Method("_load_from_checkpoint", ("resume_from_checkpoint", "model"), "adapters are read strictly"),
    _Method("_load_optimizer_and_scheduler", ("checkpoint",), "their files are read from checked bytes"),
    _Method("_load_rng_state", ("checkpoint",), "damaged random states are reported"),
    _Method("_prepare_inputs", ("inputs",), "validation moves batches to the device", overridden=False),
    _Method("save_model", ("output_dir", "_internal_call"), "sharded weights are gathered", overridden=False),
    _Method("_save_optimizer_and_scheduler", ("output_dir",), "checkpoints", overridden=False),
    _Method("_save_scaler", ("output_dir",), "checkpoints", overridden=False),
    _Method("_save_rng_state", ("output_dir",), "checkpoints", overridden=False),
)  # fmt: skip
_ATTRIBUTES = {
    "_tr_loss": "a resumed run logs what an uninterrupted one logs",
    "_total_loss_scalar": "a resumed run logs what an uninterrupted one logs",
    "_globalstep_last_logged": "a resumed run logs what an uninterrupted one logs",
    "model_accepts_loss_kwargs": "nothing but our own loss divides by the number of targets",
    "callback_handler": "callbacks learn of a validation",
}
_FILES = {
    "OPTIMIZER_NAME": OPTIMIZER,
    "SCHEDULER_NAME": SCHEDULER,
    "SCALER_NAME": SCALER,
    "TRAINER_STATE_NAME": TRAINER_STATE,
}


def missing_apis(trainer: type = Trainer, module: Any = transformers.trainer) -> list[str]:
    """What the installed Trainer lacks, one line for each; empty if braidlora can train with it."""
    source = inspect.getsource(trainer)
    found = []
    for method in _METHODS:
        parameters = _parameters(trainer, method.name)
        if parameters is None:
            found.append(f"Trainer.{method.name} is gone ({method.purpose})")
        elif lacking := [name for name in method.parameters if name not in parameters]:
            found.append(f"Trainer.{method.name} has no parameter {', '.join(lacking)} ({method.purpose})")
        elif method.overridden and f"self.{method.name}" not in source:
            found.append(f"Trainer never calls {method.name} ({method.purpose})")
    found += [
        f"Trainer.{name} is gone ({purpose})"
        for name, purpose in _ATTRIBUTES.items()
        if f"self.{name} = " not in source
    ]
    found += [
        f"transformers.trainer.{constant} is {getattr(module, constant, None)!r}, expected {name!r}"
        for constant, name in _FILES.items()
        if getattr(module, constant, None) != name
    ]
    version = transformers.__version__
    return [f"transformers {version}: {one}; checked with {', '.join(CHECKED)}" for one in found]


def _parameters(trainer: type, name: str) -> list[str] | None:
    method = getattr(trainer, name, None)
    return None if method is None else list(inspect.signature(method).parameters)
