"""One run of training, from its checks to the adapter in its run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerState, set_seed

from braidlora.config import RunConfig, dump_config
from braidlora.errors import CheckpointError, ConfigError
from braidlora.models.adapter_reader import restore_adapter
from braidlora.models.adapter_writer import save_adapter
from braidlora.runs import (
    MANIFEST,
    Committed,
    RunDirectory,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    cover,
    environment,
    hold,
)
from braidlora.tasks import Collator, data_report
from braidlora.training._trainer_compat import TRAINER_STATE
from braidlora.training.arguments import training_arguments
from braidlora.training.checkpoint import (
    Checkpoint,
    check_identity,
    check_labels,
    find_checkpoint,
    progress_file,
)
from braidlora.training.checkpointing import CheckpointingTrainer
from braidlora.training.failures import explain_disk_failures, explain_step_out_of_memory
from braidlora.training.prepare import Check, Prepared, prepare, world_size
from braidlora.training.progress import ProgressBar
from braidlora.training.run_log import RunLog
from braidlora.training.stop import StopRequest, stop_requests
from braidlora.training.threads import cpu_threads
from braidlora.training.trainer import model_restored


@contextmanager
def open_run(
    config: RunConfig,
    *,
    resume: Literal["auto"] | Path | None = None,
    allow_inexact_resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    check: Check | None = None,
) -> Iterator[Run]:
    """A run that is ready to train: its directory is locked and signals are caught for as long as the block lasts.

    Nothing has been written when the block begins.

    Args:
        config: the recipe.
        resume: `auto` resumes from the newest complete checkpoint of the run directory, if there is one; a path names
            a checkpoint, or a run directory, to resume from. The result is that of an uninterrupted run (on a
            CPU, bit for bit).
        allow_inexact_resume: resume even if optimizer, scheduler, RNG or sampler state is missing, or if a step's rows
            are split into other batches.
        overwrite: remove what an earlier run left in the run directory, once everything needed is loaded.
        progress: show progress bars on stderr.
        check: called with base, tokenizer, tasks and recipe before rows are encoded; raises what would fail later.

    Raises:
        ConfigError, DataError: the recipe or its data cannot be used.
        CheckpointError: the run directory holds another run, or the checkpoint is damaged or does not fit.
    """
    if resume is not None and overwrite:
        raise ConfigError("--resume and --overwrite cannot be combined: one resumes, the other starts over.")
    directory = RunDirectory.at(config.output)
    with hold(directory.path):
        with explain_disk_failures(directory):
            directory.restore()
        directory.refuse_to_lose(resume=resume is not None, overwrite=overwrite)
        if resume is not None and resume != "auto":
            _refuse_another_run(Path(resume), directory)
        checkpoint = None
        if resume is not None:
            checkpoint = find_checkpoint(directory, resume, world_size(), allow_inexact=allow_inexact_resume)
            if checkpoint is None and directory.state() == "finished":
                raise CheckpointError(
                    f"{directory.path}: the run is finished, but its checkpoints are missing. --overwrite starts over."
                )
            if checkpoint is not None and config.training.load_best:
                _refuse_missing_best(checkpoint, directory)
        with stop_requests() as stop, cpu_threads(config.training.threads):
            prepared = prepare(config, check)
            if checkpoint is not None:
                check_identity(
                    checkpoint, prepared.identity, prepared.sampled, allow_inexact=allow_inexact_resume
                )
                check_labels(checkpoint, prepared.label_space)
            yield Run(config, directory, prepared, checkpoint, stop, progress)


@dataclass
class Run:
    """A run in its open directory; see `open_run`.

    Attributes:
        config: the recipe.
        directory: where the run writes.
        prepared: model, tasks and rows.
        checkpoint: that the run resumes from, or None.
        stop: whether a signal asks the run to end.
        progress: whether to show progress bars.
        seconds: of training, known once `train` is done; those before a resume are included.
        tokens: that were trained on in that time, without padding.
    """

    config: RunConfig
    directory: RunDirectory
    prepared: Prepared
    checkpoint: Checkpoint | None
    stop: StopRequest
    progress: bool
    seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._run_log = RunLog(self.directory.log)
        self._bar = ProgressBar()

    def train(self) -> tuple[int, bool]:
        """Train to the end and save the adapter.

        Returns:
            the number of optimizer steps of the run, and whether this process is the one that writes.

        Raises:
            TrainingError: a loss, gradient or weight is not finite, or memory or disk ran out; checkpoints stay.
            Interrupted: SIGTERM or Ctrl-C; the current step was finished and saved.
        """
        arguments = training_arguments(self.config, self.directory.checkpoints, len(self.prepared.sampler))
        with model_restored(self.prepared.model), explain_step_out_of_memory():
            with explain_disk_failures(self.directory):
                if arguments.should_save:
                    self._write_beginning()
                trainer = self._trainer(arguments)
            self._steps(trainer)
        if arguments.should_save:
            self.seconds = self._run_log.seconds()
            self.tokens = trainer.tokens_until(trainer.state.global_step)
            with explain_disk_failures(self.directory):
                self._finish(trainer)
        return trainer.state.global_step, arguments.should_save

    def _write_beginning(self) -> None:
        directory, prepared, checkpoint = self.directory, self.prepared, self.checkpoint
        here = environment()
        if checkpoint is not None and directory.environment.is_file():
            before = directory.read_json(directory.environment.name)
            here = {
                **before,
                "resumed": [*before.get("resumed", []), {"from": checkpoint.directory.name, **here}],
            }
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.metrics.unlink(missing_ok=True)
        (directory.path / MANIFEST).unlink(missing_ok=True)  # until what it lists is written again
        if checkpoint is None:
            directory.clear()
        # First, because it marks this folder as a run's.
        atomic_write_text(directory.config, dump_config(self.config))
        directory.remove_partial()
        atomic_write_json(directory.environment, here)
        names = [path.name for path in (directory.config, directory.environment, directory.data)]
        datasets: Any = prepared.datasets
        report = data_report(prepared.tasks, datasets) | {"warnings": prepared.warnings}
        atomic_write_json(directory.data, report)
        if prepared.label_space is not None:
            atomic_write_text(directory.labels, prepared.label_space.to_json())
            names.append(directory.labels.name)
        with commit_directory(directory.adapter_init) as folder:
            save_adapter(prepared.model, folder, card=prepared.card)
        cover(directory.path, [*names, f"{directory.adapter_init.name}/{MANIFEST}"])
        seconds = 0.0
        if checkpoint is not None and checkpoint.lists(progress_file(0)):
            seconds = checkpoint.read_json(progress_file(0))["seconds"]
        self._run_log.start(checkpoint, seconds)

    def _trainer(self, arguments: Any) -> CheckpointingTrainer:
        config, prepared = self.config, self.prepared
        trainer = CheckpointingTrainer(
            prepared.model,
            arguments,
            prepared.datasets["train"],
            prepared.datasets["validation"],
            prepared.sampler,
            Collator(
                prepared.tokenizer.pad_token_id,
                config.kind,
                packing=config.prompt.packing,
                cutoff=config.prompt.cutoff,
            ),
            label_space=prepared.label_space,
            class_weights=prepared.class_weights,
            multipliers=config.training.rate_multipliers,
            load_best=config.training.load_best,
            stop=self.stop,
            callbacks=[self._bar] if self.progress else [],
            directory=self.directory,
            identity=prepared.identity,
            card=prepared.card,
            keep=config.training.keep_checkpoints,
            run_log=self._run_log,
        )
        set_seed(config.seed + arguments.process_index)  # processes draw dropout masks of their own
        return trainer

    def _steps(self, trainer: CheckpointingTrainer) -> None:
        if self.checkpoint is not None:
            state = _state_of(self.checkpoint)
            if state.global_step >= trainer.total_steps():  # the Trainer would make one step more
                restore_adapter(self.prepared.model, self.checkpoint)
                trainer.state = state
                return
        self.stop.deferred = True
        try:
            trainer.train_from(self.checkpoint)
        finally:
            self.stop.deferred = False
            self._bar.close()
        if self.stop.signal_number:
            step = trainer.state.global_step
            raise self.stop.interrupted(f"{self.directory.path}: stopped after step {step}, which is saved,")

    def _finish(self, trainer: CheckpointingTrainer) -> None:
        model, best = self.prepared.model, trainer.state.best_global_step
        if self.config.training.load_best and best and best != trainer.state.global_step:
            try:
                restore_adapter(model, _best_checkpoint(best, self.directory, self.checkpoint))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} It has the lowest validation loss, so training.load_best uses it, and it was intact "
                    f"when training began. The last step is in {self.directory.checkpoint(trainer.state.global_step)}."
                ) from None
        with commit_directory(self.directory.adapter) as folder:
            save_adapter(model, folder, card=self.prepared.card)
            self.prepared.tokenizer.save_pretrained(str(folder))
        cover(self.directory.path, [self.directory.log.name, f"{self.directory.adapter.name}/{MANIFEST}"])


def _state_of(checkpoint: Checkpoint) -> TrainerState:
    with checkpoint.copy((TRAINER_STATE,)) as copy:
        return TrainerState.load_from_json(str(copy / TRAINER_STATE))


def _refuse_another_run(named: Path, directory: RunDirectory) -> None:
    """Raise if resuming from a run elsewhere would replace the run that the output has."""
    source = named if RunDirectory(named).config.is_file() else named.parent.parent
    if directory.state() not in ("finished", "resumable") or source.resolve() == directory.path.resolve():
        return
    raise CheckpointError(
        f"{directory.path}: already has {directory.content()}, which resuming from {named} would replace. "
        f"--output={source} resumes that run where it is, and --output=PATH with a new path writes to a copy."
    )


def _refuse_missing_best(checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """Raise before training if the best checkpoint so far, which may become the result, is not intact."""
    best = _state_of(checkpoint).best_global_step
    if best and best != _state_of(checkpoint).global_step:
        try:
            _best_checkpoint(best, directory, checkpoint).verify()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It has the lowest validation loss so far, and training.load_best may use it at the end. "
                "Restore it, resume from a checkpoint before it (--resume PATH), or start over with --overwrite."
            ) from None


def _best_checkpoint(step: int, directory: RunDirectory, resumed: Checkpoint | None) -> Committed:
    """The checkpoint of a step in the run directory, or next to the one that the run was resumed from."""
    place = directory.checkpoint(step)
    if resumed is not None and not place.is_dir():
        sibling = resumed.directory.parent / place.name
        place = sibling if sibling.is_dir() else place
    return Committed(place)
