"""`train`: one run from the recipe to the evaluated adapter: training, then evaluation in the same process."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braidlora.config import RunConfig, json_differences
from braidlora.evaluation.results import write_results
from braidlora.evaluation.run import check_evaluation, evaluate_tasks
from braidlora.evaluation.scoring import majority_scores
from braidlora.models.origin import recipe_of
from braidlora.runs import RunDirectory, covered, refuse_changed
from braidlora.tasks import read_lines, size_line
from braidlora.terminal import say
from braidlora.training.failures import explain_disk_failures
from braidlora.training.run import Run, open_run


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        directory: the run directory.
        metrics: the content of `metrics.json`. In a run of several processes the first one evaluates, and `metrics` is
            empty in the others, as it is where nothing was scored.
        steps: optimizer steps of the run.
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

    A run that was killed in its evaluation is resumed there: answers that are on disk are kept.

    Args:
        config: the recipe.
        resume, allow_inexact_resume, overwrite, progress: see `open_run`.
        evaluate: score the test rows; False leaves that to a later call with `resume="auto"`.

    Raises:
        ConfigError, DataError: the recipe or its data cannot be used; nothing has been written.
        CheckpointError: the run directory holds another run, or the checkpoint is damaged or does not fit.
        TrainingError: a loss, gradient or weight is not finite, or memory or disk ran out; checkpoints stay.
        Interrupted: SIGTERM or Ctrl-C; the current step was finished and saved.
    """
    with open_run(
        config,
        resume=resume,
        allow_inexact_resume=allow_inexact_resume,
        overwrite=overwrite,
        progress=progress,
        check=check_evaluation,
    ) as run:
        directory = run.directory
        if resume == "auto" and run.checkpoint is not None and _is_done(directory, config):
            metrics = directory.read_json(directory.metrics.name)
            return RunResult(directory.path, metrics, directory.checkpoint_steps()[-1])
        if progress:
            _say_rows(run)
        steps, writes = run.train()
        metrics = _evaluate(run) if writes and evaluate else {}
        return RunResult(directory.path, metrics, steps)


def _is_done(directory: RunDirectory, config: RunConfig) -> bool:
    """Whether everything that the recipe asks for is in the run directory, unchanged.

    What is missing is made again from the last checkpoint.

    Raises:
        CheckpointError: a file has changed since it was written.
    """
    if directory.state() != "finished":
        return False
    missing = refuse_changed(directory.path, [directory.adapter])
    for problem in missing:
        warnings.warn(f"recreated from the last checkpoint: {problem}", stacklevel=3)
    listed = covered(directory.path) or {}
    metrics = directory.read_json(directory.metrics.name)
    predictions = (f"{directory.predictions.name}/{task}.jsonl" for task in metrics["tasks"])
    wanted = [directory.metrics.name, *predictions]
    # Version 0.1, and an evaluation that was killed, listed none of these.
    complete = all(name in listed for name in wanted)
    saved = recipe_of(directory)
    changed = json_differences(
        saved.evaluation.model_dump(mode="json"), config.evaluation.model_dump(mode="json")
    )
    settings = [
        f"evaluation.{key}: {old} then, {new} now" for key, old, new in changed if key != "batch_size"
    ]
    if settings:
        warnings.warn(f"evaluated again with other settings ({'; '.join(settings)})", stacklevel=3)
    return complete and not missing and not settings


def _say_rows(run: Run) -> None:
    """How the rows were divided, and how tables were read: a wrong guess of a delimiter shows in no number."""
    for task in run.prepared.tasks:
        say(f"{task.name}  {size_line(task)}")
        counts = {str(part): {"read_as": count.read_as} for part, count in task.counts.items()}
        for line in read_lines(counts):
            say(f"{task.name}  {line}")


def _evaluate(run: Run) -> dict[str, Any]:
    """Score the trained model, and write `metrics.json`."""
    prepared, start = run.prepared, time.monotonic()
    model = prepared.model.eval()
    with explain_disk_failures(run.directory):
        scores = evaluate_tasks(
            model,
            prepared.tokenizer,
            prepared.tasks,
            run.config,
            run.directory.path,
            label_space=prepared.label_space,
            resume=True,
            progress=run.progress,
        )
        evaluation = time.monotonic() - start
        metrics = {
            **scores,
            "majority": majority_scores(prepared.tasks),
            "seconds": round(run.seconds + evaluation, 3),
            "timing": {
                "training_seconds": round(run.seconds, 3),
                "evaluation_seconds": round(evaluation, 3),
                "tokens": run.tokens,
                "tokens_per_second": round(run.tokens / run.seconds, 1),
            },
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        write_results(run.directory.path, metrics)
    return metrics
