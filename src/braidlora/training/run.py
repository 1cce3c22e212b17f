"""`train`: a whole run, from the recipe to the evaluated adapter in its run directory."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import TrainerState, set_seed

from braidlora.config import RunConfig, dump_config, load_config
from braidlora.errors import CheckpointError, ConfigError, DataError, TrainingError
from braidlora.models.adapter import attach_adapter, build_adapter_config
from braidlora.models.adapter_reader import restore_adapter
from braidlora.models.adapter_writer import save_adapter
from braidlora.models.base import check_cutoff, enable_gradient_checkpointing, load_base
from braidlora.models.identity import base_record
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.runs import (
    MANIFEST,
    AdapterCard,
    Committed,
    RunDirectory,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    cover,
    covered,
    environment,
    hold,
    refuse_changed,
)
from braidlora.tasks import (
    Collator,
    LabelSpace,
    MixingSampler,
    MultiTaskDataset,
    Task,
    adapter_card,
    check_packing,
    data_report,
    encode_tasks,
    fingerprints,
    load_tasks,
)
from braidlora.training.arguments import training_arguments
from braidlora.training.checkpoint import (
    TRAINER_STATE,
    Checkpoint,
    Identity,
    check_identity,
    check_labels,
    differences,
    encoded_fingerprint,
    find_checkpoint,
    progress_file,
)
from braidlora.training.checkpointing import CheckpointingTrainer
from braidlora.training.progress import ProgressBar
from braidlora.training.run_log import RunLog
from braidlora.training.stop import StopRequest, stop_requests
from braidlora.training.trainer import cache_restored, memory_failures_told

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunResult:
    """Where a run stands and what it scored: `metrics` is the content of `metrics.json`.

    In a run of several processes the first one evaluates, and `metrics` is empty in the others, as it is where nothing
    was to be scored yet.
    """

    directory: Path
    metrics: dict[str, Any]
    steps: int


def train(
    config: RunConfig,
    *,
    resume: Literal["auto"] | Path | None = None,
    allow_inexact_resume: bool = False,
    overwrite: bool = False,
    evaluate: bool = True,
    progress: bool = True,
) -> RunResult:
    """Fine-tune the recipe's base on its tasks, save the adapter, and score it on the test rows.

    Args:
        config: the recipe.
        resume: `auto` goes on from the newest complete checkpoint of the run directory, if there is one; a path names
            a checkpoint, or a run directory, to go on from. The result is that of an uninterrupted run, on a CPU to
            the bit.
        allow_inexact_resume: go on though optimizer, scheduler, RNG or sampler state is missing, or though a step's
            rows are split differently into batches.
        overwrite: remove what an earlier run left in the run directory, once everything needed is loaded.
        evaluate: score the test rows; False leaves that to a later call with `resume="auto"`.
        progress: show progress bars on stderr.

    Raises:
        ConfigError, DataError: the recipe or its data is not usable; nothing has been written.
        CheckpointError: the run directory holds another run, or the checkpoint is damaged or does not fit.
        TrainingError: a loss, gradient or weight is not finite, or memory or disk ran out; checkpoints stay.
        Interrupted: SIGTERM or Ctrl-C; the step in hand was finished and saved.
    """
    if resume is not None and overwrite:
        raise ConfigError(
            "--resume and --overwrite exclude each other: one carries on, the other starts over."
        )
    directory = RunDirectory.at(config.output)
    with hold(directory.path):
        with disk_failures_told(directory):
            directory.restore()
        directory.refuse_to_lose(resume=resume is not None, overwrite=overwrite)
        checkpoint = None
        if resume is not None:
            checkpoint = find_checkpoint(directory, resume, _world_size(), allow_inexact=allow_inexact_resume)
            if checkpoint is None and directory.state() == "finished":
                raise CheckpointError(
                    f"{directory.path}: the run is finished, but its checkpoints are gone. --overwrite starts over."
                )
            if checkpoint is not None and config.training.load_best:
                _refuse_missing_best(checkpoint, directory)
        with stop_requests() as stop, threads(config.training.threads):
            prepared = _prepare(config)
            if checkpoint is not None:
                check_identity(
                    checkpoint, prepared.identity, prepared.sampled, allow_inexact=allow_inexact_resume
                )
                check_labels(checkpoint, prepared.label_space)
            run = _Run(config, directory, prepared, stop, progress)
            if resume == "auto" and checkpoint is not None and _is_done(directory, config):
                metrics = directory.read_json(directory.metrics.name)
                return RunResult(directory.path, metrics, directory.checkpoint_steps()[-1])
            return run.train(checkpoint, evaluate)


def _is_done(directory: RunDirectory, config: RunConfig) -> bool:
    """Whether everything that the recipe asks for stands in the run directory, as it was written.

    What is missing is made again from the last checkpoint. What has changed is somebody's doing, and stays.

    Raises:
        CheckpointError: a file has changed since it was written.
    """
    if directory.state() != "finished":
        return False
    missing = refuse_changed(directory.path, [directory.adapter])
    for problem in missing:
        warnings.warn(f"made again from the last checkpoint: {problem}", stacklevel=3)
    listed = covered(directory.path) or {}
    metrics = directory.read_json(directory.metrics.name)
    wanted = [
        directory.metrics.name,
        *(f"{directory.predictions.name}/{task}.jsonl" for task in metrics["tasks"]),
    ]
    vouched = all(
        name in listed for name in wanted
    )  # version 0.1, and an evaluation that was killed, left none
    saved = load_config(directory.config, content=directory.read(directory.config.name))
    changed = differences(
        saved.model_dump(mode="json")["evaluation"], config.model_dump(mode="json")["evaluation"]
    )
    asked = [f"evaluation.{key}: {old} then, {new} now" for key, old, new in changed if key != "batch_size"]
    if asked:
        warnings.warn(f"evaluated again with other settings ({'; '.join(asked)})", stacklevel=3)
    return vouched and not missing and not asked


def _state_of(checkpoint: Checkpoint) -> TrainerState:
    with checkpoint.copy((TRAINER_STATE,)) as copy:
        return TrainerState.load_from_json(str(copy / TRAINER_STATE))


def _refuse_missing_best(checkpoint: Checkpoint, directory: RunDirectory) -> None:
    """Raise before anything is trained where the best checkpoint so far, which may be the result, is not intact."""
    best = _state_of(checkpoint).best_global_step
    if best and best != _state_of(checkpoint).global_step:
        try:
            _best_checkpoint(best, directory, checkpoint).verify()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It has the lowest validation loss so far, and training.load_best ends with the best one. Put "
                "it back, resume from a checkpoint before it (--resume PATH), or start over with --overwrite."
            ) from None


def _best_checkpoint(step: int, directory: RunDirectory, resumed: Checkpoint | None) -> Committed:
    """The checkpoint of a step in the run directory, or beside the one that the run was resumed from."""
    place = directory.checkpoint(step)
    if resumed is not None and not place.is_dir():
        beside = resumed.directory.parent / place.name
        place = beside if beside.is_dir() else place
    return Committed(place)


@dataclass
class _Prepared:
    """Everything a run needs, loaded and checked before the first byte is written."""

    tasks: list[Task]
    label_space: LabelSpace | None
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    datasets: dict[str, MultiTaskDataset]
    sampler: MixingSampler
    identity: Identity
    sampled: str  # of the base, for checkpoints of braidlora 0.1
    card: AdapterCard


def _prepare(config: RunConfig) -> _Prepared:
    from braidlora.evaluation.run import check_evaluation

    tasks = load_tasks(config)
    label_space = LabelSpace.of(tasks) if config.kind == "classify" else None
    if isinstance(config.adapter.method, dict):
        build_adapter_config(config)  # PEFT's own settings are checked before minutes go into a large base
    set_seed(config.seed)
    base, tokenizer = load_base(config.model, config.kind, label_space)
    check_cutoff(base, config)
    check_evaluation(base, tokenizer, tasks, config)
    if config.prompt.packing:
        check_packing(base)
    datasets = {
        part: encode_tasks(tasks, tokenizer, config.prompt, part, label_space)
        for part in ("train", "validation")
    }
    if not len(datasets["train"]):
        raise DataError("no task has training rows; give at least one task `train`.")
    data = {
        **fingerprints(tasks),
        "encoded": {part: encoded_fingerprint(rows) for part, rows in datasets.items()},
    }
    record, sampled = base_record(base, config.model), sampled_fingerprint(base)
    identity = Identity.of(config, data, record, _world_size())
    card = adapter_card(tasks, label_space, record)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    model = attach_adapter(base, config, config.seed)
    rows_per_step = config.training.batch_size * config.training.gradient_accumulation * _world_size()
    sampler = MixingSampler(datasets["train"], config.mixing, config.seed, rows_per_step)
    return _Prepared(tasks, label_space, model, tokenizer, datasets, sampler, identity, sampled, card)


class _Run:
    """The steps of `train` from the first write on."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        prepared: _Prepared,
        stop: StopRequest,
        progress: bool,
    ) -> None:
        self.config, self.directory, self.prepared = config, directory, prepared
        self.stop, self.progress = stop, progress
        self.run_log = RunLog(directory.log)
        self.bar = ProgressBar()

    def train(self, checkpoint: Checkpoint | None, evaluate: bool) -> RunResult:
        config, prepared, directory = self.config, self.prepared, self.directory
        arguments = training_arguments(config, directory.checkpoints, len(prepared.sampler))
        with cache_restored(prepared.model), memory_failures_told():
            with disk_failures_told(directory):
                if arguments.should_save:
                    self._write_beginning(checkpoint)
                trainer = self._trainer(arguments)
            self._steps(trainer, checkpoint)
        if not arguments.should_save:
            return RunResult(directory.path, {}, trainer.state.global_step)
        seconds = self.run_log.seconds()
        with disk_failures_told(directory):
            self._finish(trainer, checkpoint)
            metrics = self._evaluate(seconds) if evaluate else {}
        return RunResult(directory.path, metrics, trainer.state.global_step)

    def _write_beginning(self, checkpoint: Checkpoint | None) -> None:
        directory, prepared = self.directory, self.prepared
        here = environment()
        if checkpoint is not None and directory.environment.is_file():
            before = directory.read_json(directory.environment.name)
            here = {
                **before,
                "resumed": [*before.get("resumed", []), {"from": checkpoint.directory.name, **here}],
            }
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.metrics.unlink(missing_ok=True)
        (directory.path / MANIFEST).unlink(missing_ok=True)  # until what it lists stands again
        if checkpoint is None:
            directory.clear()
        # First, for it says that this folder is a run's, whatever happens next.
        atomic_write_text(directory.config, dump_config(self.config))
        directory.remove_partial()
        atomic_write_json(directory.environment, here)
        names = [path.name for path in (directory.config, directory.environment, directory.data)]
        datasets: Any = prepared.datasets
        atomic_write_json(directory.data, data_report(prepared.tasks, datasets))
        if prepared.label_space is not None:
            atomic_write_text(directory.labels, prepared.label_space.to_json())
            names.append(directory.labels.name)
        with commit_directory(directory.adapter_init) as folder:
            save_adapter(prepared.model, folder, card=prepared.card)
        cover(directory.path, [*names, f"{directory.adapter_init.name}/{MANIFEST}"])
        seconds = 0.0
        if checkpoint is not None and checkpoint.lists(progress_file(0)):
            seconds = checkpoint.read_json(progress_file(0))["seconds"]
        self.run_log.start(checkpoint, seconds)

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
            multipliers=config.training.rate_multipliers,
            load_best=config.training.load_best,
            stop=self.stop,
            callbacks=[self.bar] if self.progress else [],
            directory=self.directory,
            identity=prepared.identity,
            card=prepared.card,
            keep=config.training.keep_checkpoints,
            run_log=self.run_log,
        )
        set_seed(config.seed + arguments.process_index)  # processes draw dropout masks of their own
        return trainer

    def _steps(self, trainer: CheckpointingTrainer, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            state = _state_of(checkpoint)
            if state.global_step >= trainer.total_steps():  # the Trainer would make one step more
                restore_adapter(self.prepared.model, checkpoint)
                trainer.state = state
                return
        self.stop.deferred = True
        try:
            trainer.train_from(checkpoint)
        finally:
            self.stop.deferred = False
            self.bar.close()
        if self.stop.signal_number:
            step = trainer.state.global_step
            raise self.stop.interrupted(f"{self.directory.path}: stopped after step {step}, which is saved,")

    def _finish(self, trainer: CheckpointingTrainer, checkpoint: Checkpoint | None) -> None:
        model, best = self.prepared.model, trainer.state.best_global_step
        if self.config.training.load_best and best and best != trainer.state.global_step:
            try:
                restore_adapter(model, _best_checkpoint(best, self.directory, checkpoint))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} It has the lowest validation loss, with which training.load_best ends, and was whole "
                    f"when training began. The last step is in {self.directory.checkpoint(trainer.state.global_step)}."
                ) from None
        with commit_directory(self.directory.adapter) as folder:
            save_adapter(model, folder, card=self.prepared.card)
            self.prepared.tokenizer.save_pretrained(str(folder))
        cover(self.directory.path, [self.directory.log.name, f"{self.directory.adapter.name}/{MANIFEST}"])

    def _evaluate(self, seconds: float) -> dict[str, Any]:
        from braidlora.evaluation.run import evaluate_tasks, write_results

        model, start = self.prepared.model, time.monotonic()
        model.eval()
        scores = evaluate_tasks(
            model,
            self.prepared.tokenizer,
            self.prepared.tasks,
            self.config,
            self.directory.path,
            label_space=self.prepared.label_space,
            resume=True,
            progress=self.progress,
        )
        metrics = {
            **scores,
            "seconds": round(seconds + time.monotonic() - start, 3),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        write_results(self.directory.path, metrics)
        return metrics


def _world_size() -> int:
    # What torchrun and `accelerate launch` set; known before any process group is made.
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many CPU threads in this block; None leaves them as they are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def disk_failures_told(
    directory: RunDirectory, then: str = "--resume auto; or give another --output"
) -> Iterator[None]:
    """Turn a refused write into a TrainingError that says what is intact and what helps."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        intact = [directory.checkpoint(step).name for step in directory.checkpoint_steps()]
        raise TrainingError(
            f"{getattr(error, 'filename', None) or directory.path}: cannot be written: "
            f"{getattr(error, 'strerror', None) or error}. "
            + (f"Intact: {', '.join(intact)}. " if intact else "")
            + f"Free space on that disk or make it writable, then {then}."
        ) from error
