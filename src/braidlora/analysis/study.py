"""The paper's controlled experiment on a user's own model and tasks (arXiv 2509.25414, section 2).

One LoRA is trained per task and seed. The seed decides where A starts (and the order of the rows), so the pairs of
these few runs fall into three groups: different tasks from the same seed, the same task from different seeds, and
both different. If A's are similar because of what they learned, the second group is similar; if they are similar
because of where they started, the first.

All runs have the same number of steps, so that no task moves further because it has more rows. Warm-up is at most a
tenth of them; B is compared with the checkpoint at that point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braidlora.analysis.drift import measure_drift
from braidlora.analysis.factors import AdapterFile
from braidlora.analysis.findings import findings
from braidlora.analysis.study_sums import drift_over_runs, similarity_by_group
from braidlora.config import AdapterSection, MixingSection, RunConfig, TaskSection
from braidlora.errors import ConfigError
from braidlora.one_run import train
from braidlora.runs import RunDirectory, read_jsonl
from braidlora.tasks import load_tasks
from braidlora.terminal import say

RUNS = "runs"
_TASKS, _SEEDS = 3, (0, 1, 2)
_FIRST = 2  # the first step of a warm-up has a rate of 0, so B is still zero after it
_PART = 10  # warm-up ends, and the first checkpoint is saved, after one tenth of the steps
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters",
            "modules_to_save", "rank_pattern", "alpha_pattern")  # fmt: skip


def run_study(
    config: RunConfig,
    root: Path,
    *,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train every task from every seed and compare the resulting A and B.

    Finished runs are reused and stopped ones resumed, so a study that was killed ends with the same numbers.

    Args:
        config: a recipe; its base, prompts, rank and training are used, its method is replaced by `lora`.
        root: the runs go to `root/runs/TASK-seedS`.
        tasks: names of two or more tasks; by default the first three with training rows.
        seeds: two or more; by default 0, 1 and 2.
        progress: show progress bars and the name of the run.

    Returns:
        an analysis with the section `study`, see docs/reference/analysis.md.

    Raises:
        ConfigError: too few tasks or seeds, an unknown task, or an adapter that is not a LoRA.
        CheckpointError: the folder holds runs of another recipe.
        BraidloraError: as `train`.
    """
    chosen = _choose_tasks(config, tasks)
    chosen_seeds = _choose_seeds(seeds)
    steps = _steps(config, chosen)
    planned = {
        f"{task}-seed{seed}": single_task_config(config, task, seed, steps, root)
        for task in chosen
        for seed in chosen_seeds
    }
    for at, (label, single) in enumerate(planned.items(), start=1):
        if progress:
            say(f"[{at}/{len(planned)}] {label}: {steps} steps", flush=True)
        train(single, resume="auto", progress=progress)
    runs = {label: RunDirectory(Path(single.output)) for label, single in planned.items()}
    pairing = [(task, seed) for task in chosen for seed in chosen_seeds]
    start = [AdapterFile(run.adapter_init, label) for label, run in runs.items()]
    end = [AdapterFile(run.adapter, label) for label, run in runs.items()]
    before = similarity_by_group(start, pairing)
    drifts = [measure_drift(run) for run in runs.values()]
    found: dict[str, Any] = {
        "base": config.model.path,
        "rank": config.adapter.r,
        "tasks": chosen,
        "seeds": chosen_seeds,
        "steps": steps,
        "warmup_steps": next(iter(planned.values())).training.warmup_steps,
        "runs": {label: {"directory": str(run.path), **_losses(run)} for label, run in runs.items()},
        "start": {"A": {key: before["A"][key] for key in ("chance", "groups")}},
        "end": similarity_by_group(end, pairing),
        "drift": drift_over_runs(drifts),
    }
    return {"study": {**found, "verdict": findings(found)}}


def single_task_config(config: RunConfig, task: str, seed: int, steps: int, root: Path) -> RunConfig:
    """The recipe of one run: a LoRA on one task, from one seed."""
    return RunConfig(
        model=config.model,
        adapter=plain_lora(config.adapter),
        tasks=_training_rows(config, [task]),
        split=config.split.model_copy(update={"test": 0.0, "validation": 0.0}),
        prompt=config.prompt,
        mixing=MixingSection(),
        training=config.training.model_copy(
            update={
                "max_steps": steps, "warmup_steps": min(config.training.warmup_steps, steps // _PART),
                "save_steps": max(_FIRST, steps // _PART), "keep_checkpoints": 1, "load_best": False,
            }
        ),
        evaluation=config.evaluation.model_copy(update={"references": {}}),
        seed=seed,
        output=str(root / RUNS / f"{task}-seed{seed}"),
    )  # fmt: skip


def plain_lora(adapter: AdapterSection) -> AdapterSection:
    """A LoRA of the same rank, scaling and targets."""
    return AdapterSection(method="lora", **{name: getattr(adapter, name) for name in _ADAPTER})


def _choose_tasks(config: RunConfig, tasks: Sequence[str] | None) -> list[str]:
    if isinstance(config.adapter.method, dict):
        raise ConfigError(
            "adapter.method: the study trains LoRAs, but this recipe's method is another PEFT configuration; add "
            "--adapter.method=lora."
        )
    known = [section.name for section in config.tasks if section.train is not None]
    chosen = known[:_TASKS] if tasks is None else list(dict.fromkeys(tasks))
    if unknown := [task for task in chosen if task not in known]:
        raise ConfigError(
            f"--tasks: unknown task {', '.join(unknown)}; those with training rows are {', '.join(known)}."
        )
    if len(chosen) < 2:
        raise ConfigError(
            f"--tasks: got {', '.join(chosen) or 'none'}; the study compares different tasks, so name at least two of "
            f"{', '.join(known)}."
        )
    return chosen


def _choose_seeds(seeds: Sequence[int] | None) -> list[int]:
    chosen = list(_SEEDS) if seeds is None else list(dict.fromkeys(seeds))
    if len(chosen) < 2:
        raise ConfigError(
            f"--seeds: got {', '.join(map(str, chosen)) or 'none'}; the study compares different seeds, so give at "
            "least two, e.g. --seeds=0,1,2."
        )
    return chosen


def _steps(config: RunConfig, tasks: Sequence[str]) -> int:
    """The steps of every run: the recipe's `max_steps`, or its epochs over the mean number of rows of a task."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    alone = RunConfig(tasks=_training_rows(config, tasks), prompt=config.prompt, seed=config.seed)
    loaded = load_tasks(alone)
    rows = sum(len(task.train) for task in loaded) / len(loaded)
    return max(1, math.ceil(training.epochs * rows / (training.batch_size * training.gradient_accumulation)))


def _training_rows(config: RunConfig, tasks: Sequence[str]) -> list[TaskSection]:
    """The sections of `tasks` without test rows: scores are not needed, and generation takes longer than training."""
    chosen = [section for section in config.tasks if section.name in tasks]
    return [section.model_copy(update={"test": None, "validation": None}) for section in chosen]


def _losses(run: RunDirectory) -> dict[str, float]:
    """The first and the last logged training loss, to show whether the run learned anything."""
    lines = read_jsonl(run.log)
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"first_loss": losses[0], "last_loss": losses[-1]}
